"""Texts that no program can be made of, or only slowly."""

from hypothesis import strategies as st

PROGRAM_LINES = (
    'def f(x):|    return x|    y = (1,|  2)|x = [|]|"""doc|doc"""|\'\'\'|if x:|else:|    pass|'
    "try:|class A:|# c|Sure, here it is:|print(x)|@deco|        z = 1|import os|\\|a=1 \\|{|f'{x'|"
    "match x:|    case 1:|return|\t y|async def g():|    if z:|except E:|elif y:|1 2"
).split("|")
ODD_LINES = ["```", "```python", "\0", "\ud800", "\x0c", "\r", "é = 1; b = 2", "'\\d'", "\u2028"]
ODD_TEXTS = st.one_of(
    st.text(st.characters()),
    st.lists(st.sampled_from(PROGRAM_LINES + ODD_LINES), max_size=12).map("\n".join),
    st.text("()[]{}:'\"\\\n \tx=,`", max_size=60),
)

HARD_TEXTS = [
    "(" * 50_000,
    ("(" * 190 + ")") * 190,
    "-" * 90_000 + "1",
    "a" + ".b" * 40_000,
    "1+" * 40_000 + "1",
    "a=" * 30_000 + "1",
    "lambda:" * 10_000 + "1",
    "[\n" * 3_000,
    '"""\n' * 3_000,
    "x = 1\n(\n" * 1_000,
    "\n".join(" " * depth + "if x:" for depth in range(300)),
    "\0\n\ud800\n" * 3_000,
    "x = 1\n" * 1_000_000,
    "```" * 30_000,
    " \n" * 100_000,
    " " * 1_000_000 + "```",
]
"""They take a parser long, or a search that looks at every start and end."""
