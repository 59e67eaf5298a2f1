"""ANTLR's closure over epsilon edges without what it spends on general cases: most of what its parser costs.

``ParserATNSimulator.closureCheckingStopState`` and ``closure_`` with the same configurations in the same order. States
with one plain epsilon edge are passed over at once: their configurations are never kept, so nobody sees them.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from antlr4.atn.ATNConfig import ATNConfig
from antlr4.atn.ATNState import ATNState, RuleStopState
from antlr4.atn.ParserATNSimulator import ParserATNSimulator
from antlr4.atn.Transition import ActionTransition, Transition


def install() -> None:
    """Make every parser of this process use it; may be called again."""
    original = ParserATNSimulator.closureCheckingStopState
    if not hasattr(original, "__wrapped__"):
        ParserATNSimulator.closureCheckingStopState = _quick(original)


def _quick(original: Any) -> Any:
    ends: dict[int, Any] = {}  # by state id; states live as long as the parser's class

    @wraps(original)
    def closure(
        self: Any, config: Any, configs: Any, busy: Any, collect: bool, full_context: bool, depth: int, eof: bool
    ) -> None:
        state = config.state
        end = ends.get(id(state))
        if end is None:
            end = ends[id(state)] = _end_of_chain(state)
        if end is not state:
            config, state = ATNConfig(state=end, config=config), end
        if isinstance(state, RuleStopState):
            original(self, config, configs, busy, collect, full_context, depth, eof)
            return
        if not state.epsilonOnlyTransitions:
            configs.add(config, self.mergeCache)
        transitions = state.transitions
        if state.stateType == ATNState.STAR_LOOP_ENTRY and self.canDropLoopEntryEdgeInLeftRecursiveRule(config):
            transitions = transitions[1:]
        for edge in transitions:
            kind = edge.serializationType
            if kind == Transition.EPSILON:
                following = ATNConfig(state=edge.target, config=config)
                closure(self, following, configs, busy, collect, full_context, depth, eof)
            elif kind == Transition.RULE:
                following = self.ruleTransition(config, edge)
                deeper = depth + 1 if depth >= 0 else depth
                closure(self, following, configs, busy, collect, full_context, deeper, eof)
            elif edge.isEpsilon or eof:  # predicates, actions, the end of the input
                collects = collect and not isinstance(edge, ActionTransition)
                following = self.getEpsilonTarget(config, edge, collects, depth == 0, full_context, eof)
                if following is None or (not edge.isEpsilon and following in busy):
                    continue
                if not edge.isEpsilon:
                    busy.add(following)
                closure(self, following, configs, busy, collects, full_context, depth, eof)

    return closure


def _end_of_chain(state: Any) -> Any:
    """The state that is reached by single plain epsilon edges alone."""
    seen = {state}
    while (
        not isinstance(state, RuleStopState)
        and state.stateType != ATNState.STAR_LOOP_ENTRY
        and len(state.transitions) == 1
        and state.transitions[0].serializationType == Transition.EPSILON
        and state.transitions[0].target not in seen
    ):
        state = state.transitions[0].target
        seen.add(state)
    return state
