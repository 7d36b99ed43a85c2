"""Large depthwise convolutions of a network of PyTorch, and the same network with them in other forms."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from replk_deploy.lowerings import LOWERINGS, NONE
from replk_deploy.lowerings.base import LARGE, Array, Candidate, LargeConv, crop
from replk_deploy.models.base import Network

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # numpy knows no bfloat16, and a rewrite only moves bits


def candidates(network: Network, size: tuple[int, int]) -> list[Candidate]:
    """Find the large convolutions of a network in the order of their names, without computing anything."""
    twin = type(network).empty(network.geometry, network.form)
    maps: dict[str, set[tuple[int, int]]] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            maps.setdefault(name, set()).add((args[0].shape[-2], args[0].shape[-1]))

        return hook

    large = {name: m for name, m in twin.named_modules() if isinstance(m, nn.Conv2d) and _is_large(m)}
    for name, module in large.items():
        module.register_forward_pre_hook(look(name))
    with torch.no_grad():
        twin(torch.empty(1, 3, *size, device="meta"))
    return [
        Candidate(
            name=name,
            channels=conv.in_channels,
            kernel=(conv.kernel_size[0], conv.kernel_size[1]),
            map=next(iter(maps[name])),
            itemsize=network.get_parameter(f"{name}.weight").itemsize,
            why="it meets maps of several sizes" if len(maps[name]) > 1 else "",
        )
        for name, conv in large.items()
        if name in maps
    ]


def rewritten(network: Network, size: tuple[int, int], forms: Mapping[str, str]) -> Network:
    """Return a network in which each large convolution named has another form, or is cropped for `none`.

    The network given stays as it was; the new one shares with it what is not rewritten.
    """
    return replaced(network, candidates(network, size), forms) if forms else network


def replaced(network: Network, places: Iterable[Candidate], forms: Mapping[str, str]) -> Network:
    """Do the same at places that were found before."""
    if not forms:
        return network
    twin = type(network).empty(network.geometry, network.form)
    twin.load_state_dict(network.state_dict(), assign=True)
    for place in places:
        if place.name in forms and place.map is not None:
            site = LargeConv(name=place.name, channels=place.channels, kernel=place.kernel, map=place.map)
            twin.set_submodule(place.name, _module(site, forms[place.name], network.get_submodule(place.name)))
    return twin.eval()


def _is_large(conv: nn.Conv2d) -> bool:
    high, wide = conv.kernel_size
    padded = conv.padding == "same" or conv.padding == (high // 2, wide // 2)
    plain = {*conv.stride, *conv.dilation} == {1} and conv.padding_mode == "zeros"
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    return bool(depthwise and plain and padded and high % 2 and wide % 2 and max(high, wide) >= LARGE)


def _module(site: LargeConv, choice: str, conv: nn.Module) -> nn.Module:
    assert isinstance(conv, nn.Conv2d)  # noqa: S101  # nothing else was looked at
    bias = conv.bias
    if choice == NONE:
        made = nn.Conv2d(
            site.channels, site.channels, site.taps, padding=site.padding, groups=site.channels, device="meta"
        )
        made.weight = nn.Parameter(_moved(conv.weight, lambda k: crop(site, k)), requires_grad=False)
        made.bias = bias
        return made
    lowering = LOWERINGS[choice]
    return lowering.module(
        site,
        _moved(conv.weight, lambda kernel: lowering.weight(site, kernel)),
        None if bias is None else _moved(bias, lambda b: lowering.bias(site, b)),
    )


def _moved(tensor: Tensor, move: Callable[[Array], Any]) -> Tensor:
    """Rearrange the bits of a tensor in numpy."""
    bits = tensor.detach().cpu().contiguous().view(BITS[tensor.itemsize])
    moved: Tensor = torch.from_numpy(move(bits.numpy()).copy()).view(tensor.dtype)
    return moved.to(tensor.device)
