"""Kinds and source lines of the operations of a compiled program, read from its text.

`jax.stages.Compiled.as_text` names every operation as a profile does, with the frames of the Python
code that it came from. lm/compiled reads the same from protos, which a profile's file lacks.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping

COMPUTE, COMMUNICATION, HOST = "compute", "communication", "host"
KINDS = (COMPUTE, COMMUNICATION, HOST)

_COLLECTIVES = re.compile(
    r"(ragged-)?all-(reduce|gather|to-all)|reduce-scatter|collective-|send|recv|partition-id-barrier"
)
_TRANSFERS = re.compile(r"infeed|outfeed|Memcpy(H2D|D2H)")
_CALLBACK = re.compile(r'custom_call_target="[^"]*callback|is_host_transfer=true')
_HOST_SPACE = re.compile(r"\bS\(5\)")  # the memory space of the host
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*? )([a-z][a-z0-9-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\{$")
_CALLED = re.compile(r"calls=%?([\w.-]+)")
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_ROW = re.compile(r"^(\d+) (.*)$")
_FIELD = re.compile(r"(\w+)=(\d+)")


@dataclasses.dataclass(frozen=True)
class Origin:
    """`kind` is one of `KINDS`; `source` is FILE:LINE, "" where the program has none."""

    kind: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Program:
    """The name of a program, and the origin of each of its operations by name."""

    name: str
    origins: Mapping[str, Origin]


def kind_of(name: str) -> str:
    """The kind of an operation by its opcode, or by its name, which begins like one."""
    if _TRANSFERS.match(name):
        return HOST
    return COMMUNICATION if _COLLECTIVES.match(name) else COMPUTE


def parse(text: str) -> Program:
    """The program of a text; its source lines are those of the innermost frames in this package, or
    else in any code that is not installed.
    """
    tables: dict[str, dict[int, str]] = collections.defaultdict(dict)
    frames: dict[str, int] = {}  # of instructions
    inside: dict[str, list[str]] = collections.defaultdict(list)  # instructions of computations
    kinds: dict[str, str] = {}
    calls: dict[str, str] = {}
    table = computation = ""
    for line in text.splitlines():
        if found := _INSTRUCTION.match(line):
            name, shape, opcode = found.groups()
            kinds[name] = _instruction_kind(opcode, shape, line)
            inside[computation].append(name)
            if frame := _FRAME.search(line):
                frames[name] = int(frame[1])
            if called := _CALLED.search(line):
                calls[name] = called[1]
        elif found := _COMPUTATION.match(line):
            computation = found[1]
        elif found := _ROW.match(line):
            tables[table][int(found[1])] = found[2]
        else:
            table = line.strip() or table
    sources = _sources(tables)
    origins = {}
    for name, kind in kinds.items():
        # a fusion, or an asynchronous operation, by what is inside of it where it does not say
        parts = [name, *inside.get(calls.get(name, ""), ())]
        source = next((s for n in parts if (s := sources.get(frames.get(n, 0)))), "")
        if name.startswith("async-"):
            kind = next((k for n in parts if (k := kinds[n]) != COMPUTE), kind)
        origins[name] = Origin(kind, source)
    head = text.partition(",")[0].split()
    return Program(head[1] if len(head) > 1 else "", origins)


def _instruction_kind(opcode: str, shape: str, line: str) -> str:
    moves_to_host = opcode.startswith("copy-") and _HOST_SPACE.search(shape)
    if moves_to_host or _CALLBACK.search(line):
        return HOST
    return kind_of(opcode)


def _sources(tables: Mapping[str, Mapping[int, str]]) -> dict[int, str]:
    """{number of a stack frame: FILE:LINE}."""
    names = {n: text.strip('"') for n, text in tables.get("FileNames", {}).items()}
    places = {}
    for number, text in tables.get("FileLocations", {}).items():
        fields = dict(_FIELD.findall(text))
        places[number] = names.get(int(fields.get("file_name_id", 0)), ""), fields.get("line", "")
    stack = {}
    for number, text in tables.get("StackFrames", {}).items():
        fields = dict(_FIELD.findall(text))
        outer = int(fields.get("parent_frame_id", number))
        stack[number] = int(fields["file_location_id"]), outer if outer != number else 0
    return {number: _innermost(number, stack, places) for number in stack}


def _innermost(
    frame: int, stack: Mapping[int, tuple[int, int]], places: Mapping[int, tuple[str, str]]
) -> str:
    other = ""
    while frame in stack:
        location, frame = stack[frame]
        file, line = places.get(location, ("", ""))
        _, is_ours, rest = file.rpartition("/lm/")
        if is_ours:
            return f"lm/{rest}:{line}"
        if not other and file and "site-packages" not in file:
            other = f"{file}:{line}"
    return other
