"""Plans: the relations of a problem, sampled before names and numbers are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from d2f.problems.frames import BASE_FRAMES, FRAMES, Frame
from d2f.problems.relation import COMPARISONS, DIRECT, QUESTIONS, Relation
from d2f.problems.stories import STORIES

RELATIONS: dict[str, Relation] = {rel.id: rel for rel in (*COMPARISONS, *STORIES)}
"""All relations by their ids: first comparisons, then events of stories."""

QUESTION_CATALOGUE: dict[str, Relation | None] = {DIRECT: None} | {q.id: q for q in QUESTIONS}
"""All questions by their ids; the direct one computes nothing and has no relation."""


def _index(relations: tuple[Relation, ...], paired: bool) -> dict[str, tuple[Relation, ...]]:
    """Return the relations that can take each frame as their first input."""
    return {
        frame.id: tuple(
            rel
            for rel in relations
            if rel.takes in frame.tags
            and bool(rel.other) == paired
            # A sentence that names two subjects side by side needs the same wording for both.
            and (frame.peer == frame.id or not (rel.peers_only or rel.other == "same"))
        )
        for frame in FRAMES.values()
    }


_ALONE = _index(COMPARISONS, False)
_PAIRED = _index((*COMPARISONS, *STORIES), True)
_STORY = _index(STORIES, False)
_ASK_ALONE = _index(QUESTIONS, False)
_ASK_PAIRED = _index(QUESTIONS, True)
_MOST_BUDGET = 7

# Weight of each group of relations in a draw among the groups that have a fitting one.
_WEIGHTS = {"alone": 0.3, "story": 0.55, "paired": 0.11, "ask": 0.9, "ask_paired": 0.25}

Choices = tuple[float, tuple[tuple[float, tuple[Relation, ...]], ...]]


def _choices(frame_id: str, pair: bool, budget: int) -> Choices:
    """Return weighted groups of relations that may follow a frame with `budget` steps left."""
    groups = {"alone": _ALONE[frame_id], "story": _STORY[frame_id]}
    if not pair:
        groups["paired"] = _PAIRED[frame_id]
        # A side branch may take up to two steps more than the question itself.
        groups["ask_paired"] = _ASK_PAIRED[frame_id] if budget <= 3 else ()
    groups["ask"] = tuple(rel for rel in _ASK_ALONE[frame_id] if len(rel.ops) == budget)
    fitting = tuple(
        (_WEIGHTS[name], fits)
        for name, rels in groups.items()
        if (fits := tuple(rel for rel in rels if len(rel.ops) <= budget))
    )
    return sum(weight for weight, _ in fitting), fitting


_CHOICES: dict[tuple[str, bool, int], Choices] = {
    (frame_id, pair, budget): _choices(frame_id, pair, budget)
    for frame_id in FRAMES
    for pair in (False, True)
    for budget in range(1, _MOST_BUDGET + 1)
}
_BILL = FRAMES["bill"]


@dataclass(slots=True, eq=False)
class Node:
    """A quantity of the plan: given (no relation) or computed from earlier nodes."""

    frame: Frame | None
    subject: int
    item: int
    relation: Relation | None = None
    a: int = -1
    b: int = -1


class Plan:
    """A growing list of quantities; subjects and items are numbers until they get names."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.nodes: list[Node] = []
        self.subjects: list[tuple[str, int, int]] = []
        """Class of each subject and, for a pair of people, the numbers of both."""
        self.items: list[str] = []
        """Word group of each item."""
        self.taken: set[tuple[str, int]] = set()
        """Frame and subject of each quantity."""
        self.changed: set[int] = set()
        """Quantities that a later event has changed; comparisons no longer refer to them."""
        self.structure = ""

    def new_subject(self, kind: str, one: int = -1, two: int = -1) -> int:
        """Add a subject and return its number."""
        self.subjects.append((kind, one, two))
        return len(self.subjects) - 1

    def new_item(self, group: str) -> int:
        """Add an item and return its number; -1 for an empty group."""
        if group:
            self.items.append(group)
        return len(self.items) - 1 if group else -1

    def add(self, node: Node) -> int:
        """Append a quantity and return its position."""
        if node.frame is not None:
            self.taken.add((node.frame.id, node.subject))
        self.nodes.append(node)
        return len(self.nodes) - 1

    def add_given(self, frame: Frame, item: int) -> int:
        """Append a given quantity with a subject of its own."""
        return self.add(Node(frame, self.new_subject(frame.who), item))

    def is_pair(self, subject: int) -> bool:
        """Return whether the subject is two people together."""
        return self.subjects[subject][0] == "pair"

    def apply(self, rel: Relation, a: int, b: int = -1) -> int:
        """Append the quantity that `rel` computes; return its position, -1 for a repetition."""
        source = self.nodes[a]
        if rel.ask:
            return self.add(Node(None, -1, -1, rel, a, b))
        assert source.frame is not None
        frame = FRAMES[source.frame.peer if rel.out == "peer" else rel.out]
        pair = self.is_pair(source.subject)
        item = source.item
        if rel.who == "same":
            if pair and frame.lead != "{n}":
                return -1
            subject = source.subject
            # The same person may not hold two quantities of one frame, whatever the item.
            if (frame.id, subject) in self.taken:
                return -1
        elif rel.who == "both":
            subject = self.new_subject("pair", source.subject, self.nodes[b].subject)
        else:
            subject = self.new_subject(frame.who)
        if rel.who in ("same", "both"):
            self.changed.update((a, b))
        if rel.item != "same":
            item = self.new_item(rel.item)
        return self.add(Node(frame, subject, item, rel, a, b))


def _partner(plan: Plan, top: int, rel: Relation, budget: int) -> tuple[int, int]:
    """Choose or build the second input of a relation; return it and the steps that it took."""
    rng, node = plan.rng, plan.nodes[top]
    assert node.frame is not None
    if rel.other != "same":
        return plan.add_given(_BILL, -1), 0
    older = [
        i
        for i, other in enumerate(plan.nodes)
        if i not in (top, *plan.changed)
        and other.frame is node.frame
        and other.item == node.item
        and not plan.is_pair(other.subject)
    ]
    if older and rng.random() < 0.6:
        return older[int(rng.random() * len(older))], 0
    if node.frame.base is None:
        return (older[0], 0) if older else (-1, 0)
    side, spent = plan.add_given(node.frame, node.item), 0
    spare = budget - len(rel.ops)
    while spare and rng.random() < 0.4:
        fits = [rel for rel in _ALONE[node.frame.id] if len(rel.ops) <= spare]
        if not fits:
            break
        step = fits[int(rng.random() * len(fits))]
        side = plan.apply(step, side)
        spare -= len(step.ops)
        spent += len(step.ops)
    return side, spent


def _extend(plan: Plan, top: int, budget: int) -> tuple[int, int]:
    """Append one relation (with a side branch at times); return the new top and its cost."""
    rng, node = plan.rng, plan.nodes[top]
    assert node.frame is not None
    total, groups = _CHOICES[node.frame.id, plan.is_pair(node.subject), budget]
    if not groups:
        return -1, 0
    draw = rng.random() * total
    rels = groups[-1][1]
    for weight, group in groups:
        draw -= weight
        if draw < 0:
            rels = group
            break
    rel = rels[int(rng.random() * len(rels))]
    side, spent = (-1, 0)
    if rel.other:
        side, spent = _partner(plan, top, rel, budget)
        if side < 0:
            return -1, 0
    cost = spent + len(rel.ops)
    if rel.ask and cost != budget:
        return -1, 0
    new = plan.apply(rel, top, side)
    if new >= 0 and cost < budget and not plan.nodes[new].frame:
        return -1, 0
    return new, cost


def sample_plan(rng: Random, num_steps: int) -> Plan | None:
    """Draw a plan of exactly `num_steps` calculations; None if no relation fits any more.

    Example:
        >>> plan = sample_plan(Random(1), 2)
        >>> plan is None or "given" in plan.structure
        True
    """
    plan = Plan(rng)
    frame = BASE_FRAMES[int(rng.random() * len(BASE_FRAMES))]
    top = plan.add_given(frame, plan.new_item(frame.items))
    budget = num_steps
    while budget:
        state = plan.nodes[top].frame
        if state is None or not state.tags:
            return None
        for _ in range(4):
            mark = len(plan.nodes)
            new, cost = _extend(plan, top, budget)
            if new >= 0:
                break
            if len(plan.nodes) > mark:
                return None
        else:
            return None
        top, budget = new, budget - cost
    plan.structure = _structure(plan)
    return plan


def _structure(plan: Plan) -> str:
    """Return a text of the plan's relations and edges; the order of equal parts has no effect."""
    nodes = plan.nodes
    tree: list[str] = []
    for node in nodes:
        if node.relation is None:
            tree.append("given")
            continue
        parts = [tree[node.a]] + ([tree[node.b]] if node.b >= 0 else [])
        tree.append(f"{node.relation.id}({','.join(parts)})")
    seen: dict[int, int] = {}

    def write(i: int) -> str:
        if i in seen:
            return f"#{seen[i]}"
        seen[i] = len(seen)
        node = nodes[i]
        if node.relation is None:
            return "given"
        if node.b < 0:
            return f"{node.relation.id}({write(node.a)})"
        first, second = node.a, node.b
        if node.relation.commutes and tree[second] < tree[first]:
            first, second = second, first
        return f"{node.relation.id}({write(first)},{write(second)})"

    text = write(len(nodes) - 1)
    relation = nodes[-1].relation
    return text if relation is not None and relation.ask else f"{DIRECT}({text})"
