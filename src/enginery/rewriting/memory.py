"""Match one, apply to all: what rules said to a layer of a block is said again in every block in the same state.

Rules that declare `pure` depend on nothing but what they read. What they read inside of the block is the same in every
block of its state (see `blocks.py`). What they read outside of it is noted with the answer, and read again before the
answer is repeated. The cost of rules thus follows the number of distinct blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from enginery.network.layer import Layer
from enginery.network.network import Network
from enginery.network.operator import Operator, signature
from enginery.rewriting.blocks import Block, Blocks
from enginery.rewriting.edit import Edit
from enginery.rewriting.matcher import ARGS, NETWORK
from enginery.rewriting.proposal import Candidate, Proposal
from enginery.rewriting.recording import Recording, fill
from enginery.rewriting.view import COUNT, View

ANSWERS = 4
"""to one layer of one state, that differ by what is read outside of the block; beyond, rules are asked every time"""


@dataclass(slots=True, eq=False)
class Answer:
    """What rules said to a layer: those of `declined` no, the one of `proposal` what is to replace it."""

    guards: list = field(default_factory=list)
    """what they read outside of the block"""
    declined: list[tuple[Candidate, bool, str | None]] = field(default_factory=list)
    names: list[Operator] = field(default_factory=list)
    """the calls that rules appended before they declined: they have used up names"""
    candidate: Candidate | None = None
    proposal: Proposal | None = None
    """with templates for its registers and its result"""
    calls: list[tuple[Operator, tuple, tuple]] = field(default_factory=list)
    repeated: int = 0

    def add(self, candidate: Candidate, proposal: Proposal, recording: Recording) -> None:
        """Notes what a rule said under a recording."""
        if proposal.result is None:
            self.declined.append((candidate, proposal.matched, proposal.reason))
            self.names += [op for op, _, _ in recording.calls]
            return
        registers = [*proposal.registers]
        registers[NETWORK] = registers[ARGS] = None
        self.candidate, self.calls = candidate, recording.calls
        self.proposal = Proposal(True, None, recording.template(registers), recording.template(proposal.result))

    def holds(self, view: View) -> bool:
        objects = view.objects
        for read, number, result in self.guards:
            if read is COUNT and number >= 0:  # by far the most frequent
                if len(objects[number]._uses) != result:
                    return False
            elif read(view, view.thing(number)) != result:
                return False
        return True

    def repeat(self, view: View, network: Network) -> Proposal | None:
        """Does at another layer what the rules would do there; new layers go to the network's cursor."""
        self.repeated += 1
        for op in self.names:
            network._claim(network._name_for(signature(op)))
        if self.proposal is None:
            return None
        made: list[Layer] = []
        for op, args, types in self.calls:
            made.append(network.add_layer(op, fill(args, view, made), types=types))
        registers = [None if value is None else fill(value, view, made) for value in self.proposal.registers]
        return Proposal(True, None, registers, fill(self.proposal.result, view, made))


class Memory:
    """The answers of one run."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._blocks = Blocks(network)
        self._answers: list[Answer] = []

    def block_of(self, layer: Layer) -> Block | None:
        """The block of a layer, if others may be in the same state."""
        block = self._blocks.of(layer)
        return block if block is not None and block.state is not None else None

    def recall(self, layer: Layer, block: Block) -> tuple[Answer, View] | None:
        for answer in block.answers.get(block.numbers[layer]) or ():
            view = block.view()
            if answer.holds(view):
                return answer, view
        return None

    def recording(self, layer: Layer, block: Block) -> Recording | None:
        """A recording to open at a layer; None where answers do not repeat."""
        known = block.answers.get(block.numbers[layer], ())
        if known is None or len(known) >= ANSWERS:
            return None
        of = self._blocks.of
        return Recording(block, layer, lambda other: of(other) is block, self.network)

    def learn(self, edit: Edit, block: Block, recording: Recording, answer: Answer) -> None:
        answers, number = block.answers, block.numbers[edit.root]
        if recording.is_void:
            answers[number] = None
            return
        answer.guards = recording.guards
        answers.setdefault(number, []).append(answer)
        self._answers.append(answer)
        edit.answer = answer

    def note(self, edit: Edit, types_changed: bool) -> None:
        if types_changed:
            self._blocks.dissolve()
        else:
            self._blocks.note(edit)

    def count(self) -> None:
        """Adds what was repeated to the reports of the rules."""
        for answer in self._answers:
            for candidate, matched, reason in answer.declined:
                candidate.fact.tried += answer.repeated
                candidate.fact.matched += answer.repeated * matched
                if reason is not None and answer.repeated:
                    candidate.fact.declined[reason] += answer.repeated
            answer.repeated = 0
