"""OGBench's scripted experts as pure functions: `play` (plans) and `noisy` (reactions).

An episode starts with `expert = begin(...)`. Each control step is `action, expert, done = act(...)`, then the
action is applied. Where `done` the expert becomes `retarget(...)` of the readings after it. `achieved` says
whether a target was reached, `healthy` whether OGBench would keep an episode with such a state.
"""

from envs_mjx.experts.scripted_expert import STYLES, ExpertState, act, begin, retarget
from envs_mjx.experts.targets import Target, achieved, healthy

__all__ = ["STYLES", "ExpertState", "Target", "achieved", "act", "begin", "healthy", "retarget"]
