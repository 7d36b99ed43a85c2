"""The exact rewrites that replk knows for a large depthwise convolution."""

from replk_deploy.lowerings.base import Lowering
from replk_deploy.lowerings.dense import Dense
from replk_deploy.lowerings.grouped import Grouped
from replk_deploy.lowerings.strip import Strip

NONE = "none"  # the choice to leave a convolution what it is
LOWERINGS: dict[str, type[Lowering]] = {Grouped.name: Grouped, Dense.name: Dense, Strip.name: Strip}
