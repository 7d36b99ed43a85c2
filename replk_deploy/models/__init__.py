"""The families of networks that replk knows."""

from replk_deploy.models.base import Network
from replk_deploy.models.baselines import Timm
from replk_deploy.models.replknet import RepLKNet

FAMILIES: dict[str, type[Network]] = {RepLKNet.family: RepLKNet, Timm.family: Timm}
