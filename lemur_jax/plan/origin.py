"""Where a value of a compiled program comes from, followed through copies, tuples and loops."""

from lemur_jax.plan.hlo import Computation, Instruction, Program

_SAME = ("copy", "bitcast", "reshape", "transpose", "convert", "copy-done", "copy-start",
         "optimization-barrier", "opt-barrier", "get-tuple-element", "slice-start", "slice-done",
         "async-done", "async-start", "async-update", "call-done", "all-gather-done",
         "all-reduce-done", "recv-done",
         "slice", "dynamic-slice", "dynamic-slice-start", "dynamic-slice-done",
         "dynamic-update-slice-done")  # fmt: skip

_CALLS = ("call-start", "async-start")  # v7x's SparseCores run whole computations beside the rest


class Origins:
    """Follows values backwards in one program."""

    def __init__(self, program: Program):
        self.program = program
        self._homes = {i.name: c for c in program.computations.values() for i in c}
        self._loops = {
            i.attribute(part): (computation, i)
            for computation in program.computations.values()
            for i in computation
            if i.opcode == "while"
            for part in ("body", "condition")
        }
        self._callers = {
            i.called: (computation, i)
            for computation in program.computations.values()
            for i in computation
            if i.opcode in _CALLS and i.called in program.computations
        }

    def home(self, name: str) -> tuple[Computation, Instruction] | None:
        """The instruction of a name, and the computation that it is of."""
        computation = self._homes.get(name)
        return (computation, computation.instructions[name]) if computation else None

    def chain(self, name: str, index: tuple[int, ...] = ()) -> list[Instruction]:
        """What a value is a copy of, nearest first: the instructions that only move, slice or
        convert it, and last the one that computed it. A value that a loop carries is what the
        loop's body puts in its place, or, if the body leaves it alone, what it began as."""
        found, seen, starts = [], set(), []
        place = (name, index)
        while place and len(found) < 60:
            if place in seen:  # a loop that only moves it about: it is what it began as
                if not starts:
                    break
                place = starts.pop()
                continue
            seen.add(place)
            home = self.home(place[0])
            if home is None:
                break
            computation, i = home
            found.append(i)
            loop = self._loop_of(computation, i)
            if loop is not None and place[1]:
                starts.append((loop.operands[0], place[1]))
            place = self._before(computation, i, place[1])
        return found

    def _loop_of(self, computation: Computation, i: Instruction) -> Instruction | None:
        """The loop whose carry an instruction is."""
        if i.opcode == "while":
            return i
        inside = i.opcode == "parameter" and computation.name in self._loops
        return self._loops[computation.name][1] if inside else None

    def _before(self, computation: Computation, i: Instruction, index: tuple[int, ...]):
        if i.opcode == "get-tuple-element":
            return i.operands[0], (int(i.attribute("index")), *index)
        if i.opcode == "tuple" and index:
            return i.operands[index[0]], index[1:]
        if i.opcode == "while" and index:
            return self._carried(self.program.computations[i.attribute("body")], index)
        if i.opcode == "parameter" and computation.name in self._loops and index:
            _, loop = self._loops[computation.name]
            body = self.program.computations[loop.attribute("body")]
            inside = self._carried(body, index)
            return inside if inside[0] in body.instructions else (loop.operands[0], index)
        if i.opcode in _CALLS and i.called in self.program.computations:
            return self.program.computations[i.called].root, ()
        if i.opcode == "parameter" and computation.name in self._callers:
            return self._callers[computation.name][1].operands[int(i.inside)], index
        if _moves(i):
            return i.operands[0], ()
        return self._through_fusion(i, index)

    def _carried(self, body: Computation, index: tuple[int, ...]):
        """What the body puts in a place of the carry; for a place that it only passes on, what the
        loop began with."""
        root = body.instructions[body.root]
        if root.opcode != "tuple":
            return root.name, index
        name = root.operands[index[0]]
        passed = body.get(name)
        if self._is_carry(body, passed) and int(passed.attribute("index")) == index[0]:
            return self._loops[body.name][1].operands[0], index
        return name, index[1:]

    def _through_fusion(self, i: Instruction, index: tuple[int, ...]):
        """The one operand that a fusion of mere movement moves."""
        if i.opcode != "fusion" or index or len(i.shapes) != 1:
            return None
        inner = self.program.computations[i.called]
        name = inner.root
        for _ in range(20):
            x = inner.instructions[name]
            if x.opcode == "parameter":
                return i.operands[int(x.inside)], ()
            if x.opcode not in _SAME or not x.operands:
                return None
            name = x.operands[0]
        return None

    def passed_on(self, body: Computation, place: int) -> bool:
        """Whether a loop's body leaves a place of its carry as it is, or only moves it about."""
        root = body.instructions[body.root]
        i = body.get(root.operands[place]) if root.opcode == "tuple" else None
        while i is not None and _moves(i) and i.opcode != "get-tuple-element":
            i = body.get(i.operands[0])
        return self._is_carry(body, i) and int(i.attribute("index")) == place

    def stored(self, update: Instruction) -> tuple[str, Instruction | None]:
        """What a dynamic-update-slice, or a fusion that ends in one, stores: ("carried", its
        place in the loop's carry) as it is, or else ("kernel", the nearest one upstream), or
        ("product", ...), or ("", None)."""
        computation = self.home(update.name)[0]
        names = [o.name for o in computation.operands(update) if not _same_shape(o, update)]
        for name in names:
            last = computation.get(name)
            while _moves(last) and last.opcode != "get-tuple-element":
                last = computation.get(last.operands[0])
            if self._is_carry(computation, last) and last.nbytes >= _slice_bytes(update):
                return "carried", last
        seen, order = set(), names
        while order and len(seen) < 80:
            i = computation.get(order.pop(0))
            if i is None or i.name in seen:
                continue
            seen.add(i.name)
            if "tpu_custom_call" in i.rest:
                return "kernel", i
            if "dot_general" in i.op_name:
                return "product", i
            order += i.operands
        return "", None

    def loop_op_name(self, name: str) -> str:
        """Origin of the innermost loop around an instruction; "" outside of loops."""
        home = self.home(name)
        if home is None or home[0].name not in self._loops:
            return ""
        return self._loops[home[0].name][1].op_name

    def _is_carry(self, computation: Computation, i: Instruction | None) -> bool:
        if i is None or i.opcode != "get-tuple-element":
            return False
        source = computation.get(i.operands[0])
        return source is not None and source.opcode == "parameter"

    def reaches(self, name: str, opcodes: tuple[str, ...], depth: int = 12) -> bool:
        """Whether a value flows, unchanged, into an instruction of one of the opcodes."""
        home = self.home(name)
        if home is None or depth == 0:
            return False
        for user in home[0].users[name]:
            inner = self.program.computations.get(user.called or "", ())
            if user.opcode in opcodes or any(i.opcode in opcodes for i in inner):
                return True
            if user.opcode in (*_SAME, "tuple", "get-tuple-element") and self.reaches(
                user.name, opcodes, depth - 1
            ):
                return True
        return False


def _moves(i: Instruction) -> bool:
    """Whether its result is its first operand, moved. A sliced prefetch ends in a ConcatBitcast."""
    return bool(i.operands) and (i.opcode in _SAME or "ConcatBitcast" in i.rest)


def _slice_bytes(update: Instruction) -> int:
    """Bytes of one slice of the stacked array that an update writes into."""
    return update.shapes[0].nbytes // max(update.shapes[0].dims[0], 1)


def _same_shape(a: Instruction, b: Instruction) -> bool:
    return bool(a.shapes and b.shapes) and a.shapes[0].dims == b.shapes[0].dims
