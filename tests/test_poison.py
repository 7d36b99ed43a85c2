"""The poisoned copy: statistics that fit, disturbed, so that a fold has nowhere to hide a mistake."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from replk_deploy.fuse import batch_norms, fuse
from replk_deploy.models.base import Network
from replk_deploy.models.replknet import RepLKNet
from replk_deploy.poison import poison, randomise
from replk_deploy.verify import SIGNAL
from tests import networks

NAMES = list(networks.GEOMETRIES)


def fresh(name: str = "small", *, seed: int = 0) -> Network:
    return randomise(RepLKNet.build(networks.GEOMETRIES[name], "training"), seed=seed)


def norms_of(model: Network) -> dict[str, nn.BatchNorm2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def signal_of(model: Network, *, seed: int = 5) -> float:
    """Return how far apart the answers to two images are, relative, for the output where it is least."""
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)).double()
    with torch.inference_mode():
        return min(float((out[0] - out[1]).norm() / out[0].norm()) for out in model(images))


def poisoned_with_its_images(model: Network, *, seed: int = 0) -> tuple[Network, Tensor]:
    """Return the poisoned copy and the images that were sent through it."""
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))  # copied along with the network
    twin = poison(model, seed=seed)
    (images,) = seen
    return twin, images


def normalised_inputs(model: Network, images: Tensor) -> dict[str, Tensor]:
    """Return what each norm's own statistics make of its input: [C, samples]."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(norm: nn.BatchNorm2d, args: Any) -> None:
            x = args[0].transpose(0, 1).flatten(1)
            seen[name] = (x - norm.running_mean[:, None]) / torch.sqrt(norm.running_var[:, None] + norm.eps)

        return hook

    model._forward_pre_hooks.clear()
    hooks = [norm.register_forward_pre_hook(keep(name)) for name, norm in norms_of(model).items()]
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    return seen


def same(a: Network, b: Network) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(ka == kb and torch.equal(ta, tb) for (ka, ta), (kb, tb) in pairs)


def test_the_seed_alone_decides_whatever_the_global_generator_does() -> None:
    model = fresh()
    torch.manual_seed(1)
    first = poison(model, seed=7)
    torch.manual_seed(2)
    torch.rand(10)
    state = torch.get_rng_state()
    assert same(first, poison(model, seed=7))
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(first, poison(model, seed=8))
    assert same(fresh(seed=3), fresh(seed=3))
    assert not same(fresh(seed=3), fresh(seed=4))


def test_the_network_that_came_in_is_untouched_to_the_bit() -> None:
    model = networks.trained().requires_grad_(requires_grad=True)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    twin = poison(model)
    assert all(torch.equal(model.state_dict()[k], t) for k, t in before.items())
    assert not model._forward_pre_hooks
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert {p.dtype for p in twin.parameters()} == {torch.float64}
    assert not any(m._forward_pre_hooks for m in (*model.modules(), *twin.modules()))
    shared = {t.data_ptr() for t in model.state_dict().values()} & {t.data_ptr() for t in twin.state_dict().values()}
    assert not shared


def test_only_norms_change() -> None:
    model = fresh().double()
    twin, norms = poison(model).state_dict(), batch_norms(model)
    for key, tensor in model.state_dict().items():
        norm = key.rsplit(".", 1)[0] in norms and not key.endswith("num_batches_tracked")
        assert torch.equal(tensor, twin[key]) != norm, key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_images_differ_in_the_answer(name: str, seed: int) -> None:
    assert signal_of(poison(fresh(name, seed=seed), seed=seed)) > SIGNAL


def test_statistics_that_ignore_the_activations_would_make_the_network_blind() -> None:
    """The reason for fitting: the same noise without a look at the activations leaves no signal to compare."""
    model, rng = fresh().double(), torch.Generator().manual_seed(0)
    for norm in norms_of(model).values():
        norm.running_mean = torch.randn(norm.num_features, generator=rng).double()
        norm.running_var = 1e4 * (0.5 + torch.rand(norm.num_features, generator=rng).double())
    assert signal_of(model) < SIGNAL < signal_of(poison(model))


@pytest.mark.parametrize("name", NAMES)
def test_about_a_fifth_of_the_gammas_are_negative_and_none_is_trivial(name: str) -> None:
    norms = norms_of(poison(fresh(name), seed=1)).values()
    gamma, beta = (torch.cat([getattr(n, leaf) for n in norms]) for leaf in ("weight", "bias"))
    assert 0.15 < float((gamma < 0).double().mean()) < 0.26  # 600 to 1300 gammas: 0.2 within 3 standard errors
    assert 0.25 < float(gamma.abs().std()) < 0.35
    assert 0.95 < float(gamma.abs().mean()) < 1.05
    assert 0.25 < float(beta.std()) < 0.35
    assert abs(float(beta.mean())) < 0.05


@pytest.mark.parametrize("origin", ["fresh", "trained"])
@pytest.mark.parametrize("name", NAMES)
def test_the_statistics_fit_the_activations_and_are_disturbed(name: str, origin: str) -> None:
    model = fresh(name) if origin == "fresh" else networks.trained(networks.GEOMETRIES[name])
    twin, images = poisoned_with_its_images(model, seed=3)
    assert images.shape == (8, 3, 96, 96)
    assert 0.9 < float(images.std()) < 1.1
    seen = normalised_inputs(twin, images)
    assert seen.keys() == norms_of(model).keys()
    for norm, z in seen.items():
        alive = z.std(1) > 0  # a channel behind a dead ReLU has no variance to fit
        assert float(alive.double().mean()) > 0.7, norm
        mean, sd = z.mean(1)[alive], z.std(1)[alive]
        assert bool((sd < 1.45).all()), f"{norm}: variance too small"  # 1 / sqrt(U(0.5, 1.5)) is 0.82 to 1.41
        assert 0.75 < float(sd.median()) < 1.45, f"{norm}: variance not fitted"
        assert float(sd.max() - sd.min()) > 0.2, f"{norm}: variance fitted and not disturbed"
        assert float(mean.abs().max()) < 2, f"{norm}: mean not fitted"
        assert 0.12 < float(mean.square().mean().sqrt()) < 0.65, f"{norm}: mean fitted and not disturbed"


def test_a_folded_network_has_nothing_to_poison() -> None:
    folded = fuse(networks.trained()).model
    twin = poison(folded)
    assert twin is not folded
    assert same(twin, folded)


def test_randomise_keeps_the_scale_and_returns_its_argument() -> None:
    model = RepLKNet.build(networks.SMALL, "folded")
    assert randomise(model, seed=1) is model
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            assert 0.6 < float(module.weight.detach().std()) * fan_in**0.5 < 1.4
            assert float(module.bias.detach().abs().max()) > 0
