"""Pages are handed out once, counted right, and prompts kept for as long as there is room."""

import itertools

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from d2f.errors import D2FError
from d2f.models.cache import PagePool, PromptCache


class Pages(RuleBasedStateMachine):
    """Sequences that take, share and let go of pages, beside a plain model of who holds what."""

    @initialize(count=st.integers(1, 12))
    def start(self, count):
        self.all = set(range(1, count + 1))
        self.pool = PagePool(count + 1)
        self.prompts = PromptCache(self.pool)
        self.sequences: list[list[int]] = []
        self.kept: dict[int, list[int]] = {}
        self.names = itertools.count()

    def held(self):
        return list(itertools.chain(*self.sequences, *self.kept.values()))

    @rule(count=st.integers(0, 5))
    def take(self, count):
        free = self.all - set(self.held())
        if count > len(free):
            with pytest.raises(D2FError, match="are free"):
                self.pool.take(count)
            return
        pages = self.pool.take(count)
        assert len(set(pages)) == count
        assert set(pages) <= free, "a page that somebody holds was handed out"
        self.sequences.append(pages)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def share(self, data):
        pages = data.draw(st.sampled_from(self.sequences))
        self.pool.share(pages)
        self.sequences.append(list(pages))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def join(self, data):
        pages = data.draw(st.sampled_from(list(self.kept.values())))
        self.pool.share(pages)
        self.sequences.append(list(pages))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data):
        index = data.draw(st.integers(0, len(self.sequences) - 1))
        self.pool.release(self.sequences.pop(index))

    @precondition(lambda self: self.kept)
    @rule()
    def release_all(self):
        while self.sequences:
            self.pool.release(self.sequences.pop())

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), again=st.booleans())
    def keep(self, data, again):
        pages = data.draw(st.sampled_from(self.sequences))
        name = next(iter(self.kept)) if again and self.kept else next(self.names)
        self.prompts.keep([name], pages, None)
        self.kept.pop(name, None)
        self.kept[name] = list(pages)

    @rule(data=st.data())
    def find(self, data):
        name = data.draw(st.sampled_from([*self.kept, -1]))
        entry = self.prompts.find([name])
        assert (entry is None) == (name == -1)
        if entry is not None:
            assert entry.pages == self.kept[name]
            self.kept[name] = self.kept.pop(name)

    @rule(count=st.integers(0, 12), data=st.data())
    def make_room(self, count, data):
        name = data.draw(st.sampled_from([*self.kept, -1]))
        before = dict(self.kept)
        there_was = self.pool.num_free >= count
        made = self.prompts.make_room(count, spared=self.prompts.find([name]))
        self.kept = {n: pages for n, pages in before.items() if self.prompts.find([n]) is not None}
        assert made == (self.pool.num_free >= count)
        assert name == -1 or name in self.kept, "the spared one was given up"
        if there_was or not made:
            assert self.kept == before, "given up in vain"

    @rule()
    def clear(self):
        self.prompts.clear()
        self.kept.clear()

    @invariant()
    def counts_are_right(self):
        if not hasattr(self, "pool"):
            return
        assert self.pool.num_free == len(self.all - set(self.held()))
        assert len(self.prompts) == len(self.kept)
        used = set(itertools.chain(*self.sequences))
        assert self.pool.num_available == len(self.all - used)
        assert self.pool.num_held_once(sorted(self.held())) == sum(
            self.held().count(page) == 1 for page in self.held()
        )


TestPages = Pages.TestCase
TestPages.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, derandomize=True
)


def test_the_prompt_unused_for_longest_goes_first():
    pool = PagePool(4)
    prompts = PromptCache(pool)
    for name in (1, 2, 3):
        pages = pool.take(1)
        prompts.keep([name], pages, torch.zeros(1))
        pool.release(pages)
    prompts.find([1])
    assert prompts.make_room(1)
    assert prompts.find([2]) is None
    assert prompts.find([1]) is not None


def test_a_lone_sequence_gets_neighbouring_pages():
    pool = PagePool(9)
    first = pool.take(5)
    pool.release(first)
    assert pool.take(8) == list(range(1, 9))
