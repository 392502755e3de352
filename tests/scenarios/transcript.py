"""The text of a scenario: a list of blocks, each of commands, `----`, the expected lines, an empty line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations


@dataclass(frozen=True, slots=True)
class Block:
    """Some commands, and what they bring about."""

    comments: tuple[str, ...]
    commands: tuple[str, ...]
    expected: tuple[str, ...]


def parse(text: str) -> list[Block]:
    """The blocks of a scenario file."""
    blocks = []
    for chunk in text.strip().split("\n\n"):
        before, _, after = chunk.partition("\n----")
        lines = before.splitlines()
        comments = tuple(line for line in lines if line.startswith("#"))
        commands = tuple(line for line in lines if not line.startswith("#"))
        blocks.append(Block(comments, commands, tuple(after.strip().splitlines())))
    return blocks


def render(blocks: list[Block]) -> str:
    """The text of blocks."""
    chunks = []
    for block in blocks:
        lines = [*block.comments, *block.commands]
        if block.commands:
            lines += ["----", *block.expected]
        chunks.append("\n".join(lines))
    return "\n\n".join(chunks) + "\n"


def orders(blocks: list[Block]) -> Iterator[list[Block]]:
    """The blocks with every order of the commands below `in any order:`; one such list in a scenario."""
    for number, block in enumerate(blocks):
        if "in any order:" in block.commands:
            start = block.commands.index("in any order:")
            fixed, free = block.commands[:start], block.commands[start + 1 :]
            for order in permutations(free):
                yield [*blocks[:number], replace(block, commands=fixed + order), *blocks[number + 1 :]]
            return
    yield blocks
