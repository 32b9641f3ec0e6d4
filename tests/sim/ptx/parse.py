"""PTX text to kernels, instructions and operands. What is not understood is an error that names the line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace


class PtxError(Exception):
    """The text has something that the interpreter does not know."""


@dataclass(frozen=True)
class Register:
    """A number in the kernel's list of registers, and its declared class: pred, b16, b32 or b64."""

    index: int
    kind: str
    name: str


@dataclass(frozen=True)
class Immediate:
    """`text` as written: an integer, or 0f and 0d with the bits of a float."""

    text: str


@dataclass(frozen=True)
class Special:
    name: str  # %tid.x


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Negated:
    register: Register  # !%p1


@dataclass(frozen=True)
class Sink:
    """`_`: the value is not wanted."""


@dataclass(frozen=True)
class Pair:
    first: Register | Sink  # %r1|%p1
    second: Register


@dataclass(frozen=True)
class Vector:
    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | None
    offset: int


@dataclass(frozen=True)
class Box:
    """[map, {coordinates}]: a tensor map's address, and where in the tensor, the innermost dimension first."""

    map: Address
    coordinates: tuple[Operand, ...]


Operand = Register | Immediate | Special | Symbol | Negated | Pair | Vector | Address | Box | Sink


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with all modifiers
    operands: tuple[Operand, ...]
    guard: Register | Negated | None
    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass(frozen=True)
class Variable:
    """Of shared memory; size 0: as many bytes as the launch gives."""

    name: str
    align: int
    size: int


@dataclass(frozen=True)
class Parameter:
    name: str
    align: int
    size: int


@dataclass
class Kernel:
    name: str
    target: str
    parameters: list[Parameter]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # to the index of an instruction
    registers: list[Register] = field(default_factory=list)
    shared: list[Variable] = field(default_factory=list)


_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_REGISTER_KINDS = {"pred": "pred", **{f"{letter}{n}": f"b{n}" for n in (16, 32, 64) for letter in "busf"}}
_INTEGER = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|\d+)U?$")
_FLOAT = re.compile(r"0[fF][0-9a-fA-F]{8}$|0[dD][0-9a-fA-F]{16}$")
_IGNORED = (
    ".loc",
    ".file",
    ".pragma",
    ".version",
    ".address_size",
    ".maxntid",
    ".minnctapersm",
    ".reqntid",
    ".maxnreg",
)
_DIRECTIVE = re.compile(rf"(?:{'|'.join(map(re.escape, (*_IGNORED, '.target')))})\b[^\n]*")
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_HEADER = re.compile(r"\.(visible|entry|weak|func)\b")
_SPACE = re.compile(r"\s*")
_INSTRUCTION = re.compile(r"(?:@(!?[%\w$]+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?$")
_SPECIALS = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]$|%(laneid|warpid)$")


def parse(text: str, name: str) -> Kernel:
    """The kernel of that name; the bodies of others are not looked at."""
    kernels = _Parser(text, name).kernels
    if name not in kernels:
        raise PtxError(f"no kernel {name} in this text, which has {', '.join(kernels) or 'none'}")
    return kernels[name]


def parameter_of(text: str, line: int) -> Parameter:
    if match := re.fullmatch(r"\.param\s+\.align\s+(\d+)\s+\.b8\s+(\S+)\[(\d+)\]", text):
        return Parameter(match[2], int(match[1]), int(match[3]))
    if match := re.fullmatch(
        r"\.param\s+\.[busf](\d+)(?:\s+\.ptr(?:\s+\.global)?(?:\s+\.align\s+\d+)?)?\s+([\w$]+)", text
    ):
        size = _SIZES[match[1]]
        return Parameter(match[2], size, size)
    raise PtxError(f"line {line}: not a parameter that is known: {text}")


class _Parser:
    def __init__(self, text: str, wanted: str) -> None:
        text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
        text = re.sub(r"//[^\n]*", "", text)
        debug = re.search(r"^\s*\.section\s", text, re.M)
        self.text = text[: debug.start()] if debug else text
        self.position, self.line, self.started = 0, 1, 1
        self.wanted = wanted
        self.kernels: dict[str, Kernel] = {}
        self.target = ""
        self.module_shared: list[Variable] = []
        while statement := self.next_statement():
            self.at_module(statement)

    def next_statement(self) -> str:
        """Up to `;`, a label, or a brace of a scope; '' at the end. A directive ends with its line."""
        text = self.text
        start = _SPACE.match(text, self.position).end()
        self.line += text.count("\n", self.position, start)
        self.position = start
        if start == len(text):
            return ""
        if text[start] in "{}":
            self.position += 1
            return text[start]
        if directive := _DIRECTIVE.match(text, start):
            self.position = directive.end()
            return directive[0].strip()
        if label := _LABEL.match(text, start):
            self.position = label.end()
            return label[1] + ":"
        self.position = text.index("{", start) if _HEADER.match(text, start) else text.index(";", start) + 1
        self.started = self.line
        statement = text[start : self.position]
        self.line += statement.count("\n")
        return statement.strip().removesuffix(";").strip()

    def at_module(self, statement: str) -> None:
        if statement.startswith(".target"):
            self.target = statement.split()[1].rstrip(",")
        elif _DIRECTIVE.match(statement) or re.match(r"(\.visible\s+)?\.(extern\s+\.)?global\b", statement):
            pass  # variables in global memory: a use of one fails, as its name is not known
        elif variable := self.shared_variable(statement):
            self.module_shared.append(variable)
        elif match := re.match(r"(?:\.visible\s+|\.weak\s+)?\.entry\s+([\w$]+)\s*\((.*?)\)(.*)$", statement, re.S):
            texts = [re.sub(r"\s+", " ", part).strip() for part in match[2].split(",")]
            for directive in re.findall(r"\.\w+", match[3]):
                if directive not in _IGNORED:
                    raise PtxError(f"line {self.line}: directive {directive} is not known")
            kernel = Kernel(match[1], self.target, [parameter_of(t, self.line) for t in texts if t])
            kernel.shared = list(self.module_shared)
            if self.next_statement() != "{":
                raise PtxError(f"line {self.line}: the body of {kernel.name} was expected")
            self.kernels[kernel.name] = kernel
            if kernel.name == self.wanted:
                self.body(kernel)
            else:
                end = body_end(self.text, self.position - 1)
                self.line += self.text.count("\n", self.position, end)
                self.position = end
        else:
            raise PtxError(f"line {self.line}: not known outside of a kernel: {statement.splitlines()[0]}")

    def shared_variable(self, statement: str) -> Variable | None:
        pattern = r"(?:\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.[busf](\d+)\s+([\w$]+)(?:\[(\d*)\])?$"
        match = re.match(pattern, statement)
        if match is None or match[2] not in _SIZES:
            return None
        count = 1 if match[4] is None else int(match[4] or 0)
        return Variable(match[3], int(match[1]), count * _SIZES[match[2]])

    def body(self, kernel: Kernel) -> None:
        scopes: list[dict[str, Register]] = [{}]
        labels: list[dict[str, int]] = [kernel.labels]  # those of inner scopes are known there alone
        opened = [0]  # the first instruction of each scope
        while True:
            statement = self.next_statement()
            if statement == "":
                raise PtxError(f"the body of {kernel.name} does not end")
            if statement == "{":
                scopes.append({})
                labels.append({})
                opened.append(len(kernel.instructions))
            elif statement == "}":
                scopes.pop()
                if not scopes:
                    return
                self.close(kernel, labels.pop(), opened.pop())
            elif statement.endswith(":"):
                labels[-1][statement[:-1]] = len(kernel.instructions)
            elif statement.startswith(".reg"):
                self.declare(kernel, scopes[-1], statement)
            elif statement.startswith(".shared"):
                variable = self.shared_variable(statement)
                if variable is None:
                    raise PtxError(f"line {self.line}: not known: {statement}")
                kernel.shared.append(variable)
            elif _DIRECTIVE.match(statement):
                pass
            elif statement.startswith("."):
                raise PtxError(f"line {self.line}: not known in a kernel: {statement}")
            else:
                kernel.instructions.append(self.instruction(scopes, statement))

    def close(self, kernel: Kernel, labels: dict[str, int], opened: int) -> None:
        """Gives the labels of a scope names of their own, there and where the scope's instructions name them."""
        for name, place in labels.items():
            own = f"{name}@{place}"
            kernel.labels[own] = place
            for i in range(opened, len(kernel.instructions)):
                old = kernel.instructions[i]
                if old.opcode in ("bra", "bra.uni") and old.operands == (Symbol(name),):
                    kernel.instructions[i] = replace(old, operands=(Symbol(own),))

    def declare(self, kernel: Kernel, scope: dict[str, Register], statement: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement, re.S)
        if match is None or match[1] not in _REGISTER_KINDS:
            raise PtxError(f"line {self.line}: registers of a type that is not known: {statement}")
        for part in match[2].split(","):
            name = part.strip()
            if many := re.match(r"(.+)<(\d+)>$", name):
                names = [f"{many[1]}{i}" for i in range(int(many[2]))]
            else:
                names = [name]
            for each in names:
                register = Register(len(kernel.registers), _REGISTER_KINDS[match[1]], each)
                kernel.registers.append(register)
                scope[each] = register

    def instruction(self, scopes: list[dict[str, Register]], statement: str) -> Instruction:
        line = self.started
        text = re.sub(r"\s+", " ", statement)
        match = _INSTRUCTION.match(text)
        if match is None:
            raise PtxError(f"line {line}: not an instruction: {text}")
        guard = self.operand(scopes, match[1], line) if match[1] else None
        operands = tuple(self.operand(scopes, part, line) for part in split(match[3] or ""))
        return Instruction(match[2], operands, guard, line, text)

    def operand(self, scopes: list[dict[str, Register]], text: str, line: int) -> Operand:
        text = text.strip()
        for scope in reversed(scopes):
            if text in scope:
                return scope[text]
        if text == "_":
            return Sink()
        if _INTEGER.match(text) or _FLOAT.match(text):
            return Immediate(text)
        if text.startswith("{") and text.endswith("}"):
            return Vector(tuple(self.operand(scopes, part, line) for part in split(text[1:-1])))
        if text.startswith("[") and text.endswith("]"):
            return self.address(scopes, text[1:-1].strip(), line)
        if text.startswith("!"):
            return Negated(self.register(scopes, text[1:], line))
        if "|" in text:
            first, second = (part.strip() for part in text.split("|"))
            return Pair(
                Sink() if first == "_" else self.register(scopes, first, line), self.register(scopes, second, line)
            )
        if _SPECIALS.match(text):
            return Special(text)
        if re.match(r"[\w$]+$", text):
            return Symbol(text)
        raise PtxError(f"line {line}: operand {text} is not known")

    def register(self, scopes: list[dict[str, Register]], text: str, line: int) -> Register:
        found = self.operand(scopes, text, line)
        if not isinstance(found, Register):
            raise PtxError(f"line {line}: {text} is not a register")
        return found

    def address(self, scopes: list[dict[str, Register]], text: str, line: int) -> Address | Box:
        if text.endswith("}"):
            where, coordinates = split(text)
            return Box(self.address(scopes, where.strip(), line), self.operand(scopes, coordinates, line).parts)
        match = re.match(r"([^\s+]+?)\s*(?:\+\s*(-?\w+))?$", text)
        if match is None:
            raise PtxError(f"line {line}: address [{text}] is not known")
        base = self.operand(scopes, match[1], line)
        if isinstance(base, Immediate) and match[2] is None:
            return Address(None, int(base.text, 0))
        if not isinstance(base, (Register, Symbol)):
            raise PtxError(f"line {line}: address [{text}] is not known")
        return Address(base, int(match[2], 0) if match[2] else 0)


def body_end(text: str, start: int) -> int:
    """Behind the brace that closes the first one from `start` on."""
    depth = 0
    for brace in re.finditer(r"//[^\n]*|[{}]", text[start:]):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if brace[0] == "}" and depth == 0:
            return start + brace.end()
    raise PtxError("a body that does not end")


def split(text: str) -> list[str]:
    """At the commas that are not inside of braces or brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]] if text.strip() else []
