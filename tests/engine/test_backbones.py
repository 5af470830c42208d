import sys
from typing import Annotated

import pytest
import torch
from pydantic import Field
from torch import nn

from pfc.data.errors import UsageError
from pfc.engine.backbones import backbone_names, build_backbone, register
from pfc.engine.groups import block_numbers

IRESNET_BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 14, 3], 100: [3, 13, 30, 3], 200: [6, 26, 60, 6]}
IRESNET_PARAMETERS = {18: 24_025_600, 34: 34_139_328, 50: 43_590_848, 100: 65_156_160, 200: 118_833_920}
CPU_SIZED = ["iresnet18", "mobilefacenet", "small"]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def iresnet_parameters(blocks, embedding_dim, height, width):
    """Counted by hand: a 3×3 convolution without bias 9·c·c', a norm 2·c, a PReLU c."""
    count = 9 * 3 * 64 + 2 * 64 + 64
    channels = 64
    for out, depth in zip([64, 128, 256, 512], blocks, strict=True):
        count += channels * out + 2 * out  # the first block's 1×1 shortcut and its norm
        for _ in range(depth):
            count += 2 * channels + 9 * channels * out + 2 * out + out + 9 * out * out + 2 * out
            channels = out
    count += 2 * 512
    return count + 512 * -(-height // 16) * -(-width // 16) * embedding_dim + embedding_dim + 2 * embedding_dim


@pytest.mark.parametrize("number", IRESNET_BLOCKS)
def test_iresnet_has_the_known_number_of_parameters(number):
    with torch.device("meta"):
        model = build_backbone(f"iresnet{number}", embedding_dim=512, image_size=(112, 112))
        narrow = build_backbone(f"iresnet{number}", embedding_dim=64, image_size=(50, 33))
    assert parameters(model) == IRESNET_PARAMETERS[number]
    assert parameters(model) == iresnet_parameters(IRESNET_BLOCKS[number], 512, 112, 112)
    assert parameters(narrow) == iresnet_parameters(IRESNET_BLOCKS[number], 64, 50, 33)


@pytest.mark.parametrize("number", [18, 50])
def test_iresnet_state_dict_has_the_common_names(number):
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["conv1.weight", "prelu.weight", "fc.weight", "fc.bias"]
    names += [f"{module}.{leaf}" for module in ("bn1", "bn2", "features") for leaf in norm]
    for layer, depth in enumerate(IRESNET_BLOCKS[number], start=1):
        for block in range(depth):
            prefix = f"layer{layer}.{block}."
            names += [prefix + name for name in ("conv1.weight", "conv2.weight", "prelu.weight")]
            names += [f"{prefix}{module}.{leaf}" for module in ("bn1", "bn2", "bn3") for leaf in norm]
        names += [f"layer{layer}.0.downsample.0.weight"] + [f"layer{layer}.0.downsample.1.{leaf}" for leaf in norm]
    with torch.device("meta"):
        model = build_backbone(f"iresnet{number}", embedding_dim=512, image_size=(112, 112))
    assert sorted(model.state_dict()) == sorted(names)


def test_iresnet_final_norm_keeps_its_weight_at_one():
    model = build_backbone("iresnet18", embedding_dim=16, image_size=(32, 32))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.features.weight, torch.ones(16))
    assert not torch.equal(model.features.bias, torch.zeros(16))


def test_iresnet_block_computes_the_papers_formula():
    """BN → 3×3 → BN → PReLU → 3×3 stride 2 → BN, plus BN of the 1×1 stride 2."""
    model = build_backbone("iresnet18", embedding_dim=16, image_size=(32, 32)).eval()
    block, f, x = model.layer2[0], nn.functional, torch.randn(2, 64, 16, 16)

    def norm(module, x):
        return f.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias, eps=1e-5)

    y = norm(block.bn2, f.conv2d(norm(block.bn1, x), block.conv1.weight, padding=1))
    y = f.conv2d(f.prelu(y, block.prelu.weight), block.conv2.weight, stride=2, padding=1)
    shortcut = norm(block.downsample[1], f.conv2d(x, block.downsample[0].weight, stride=2))
    torch.testing.assert_close(block(x), norm(block.bn3, y) + shortcut)


def test_mobilefacenet_has_the_papers_number_of_parameters():
    def bottleneck(channels, out, expansion):
        hidden = expansion * channels
        return channels * hidden + 9 * hidden + hidden * out + 6 * hidden + 2 * out  # two norms + PReLUs, one norm

    count = 27 * 64 + 3 * 64 + 9 * 64 + 3 * 64  # 3×3, depthwise 3×3; a norm and a PReLU after each
    channels = 64
    for expansion, out, repeats in [(2, 64, 5), (4, 128, 1), (2, 128, 6), (4, 128, 1), (2, 128, 2)]:
        for _ in range(repeats):
            count += bottleneck(channels, out, expansion)
            channels = out
    count += 128 * 512 + 3 * 512 + 7 * 7 * 512 + 2 * 512 + 512 * 128 + 2 * 128
    model = build_backbone("mobilefacenet", embedding_dim=128, image_size=(112, 112))
    assert parameters(model) == count == 1_003_136
    wide = build_backbone("mobilefacenet", embedding_dim=512, image_size=(112, 112))
    assert parameters(wide) == count + 384 * 514


@pytest.mark.parametrize("name", CPU_SIZED)
@pytest.mark.parametrize("image_size", [(32, 32), (33, 50), (16, 47)])
def test_any_image_size_gives_embeddings_of_the_asked_length(name, image_size):
    model = build_backbone(name, embedding_dim=24, image_size=image_size)
    images = torch.rand(3, 3, *image_size) * 2 - 1
    embeddings = model(images)
    assert embeddings.shape == (3, 24)
    embeddings.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", CPU_SIZED)
def test_embeddings_are_float32_under_autocast_and_the_same_in_channels_last(name):
    model = build_backbone(name, embedding_dim=24, image_size=(32, 32)).eval()
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    plain = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images)
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(plain, half).min() > 0.99
    last = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["group", "none"])
def test_small_without_batch_norm_treats_each_image_by_itself(norm):
    model = build_backbone("small", embedding_dim=24, image_size=(32, 32), norm=norm, width=16)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-5)
    assert not list(model.buffers())


def test_small_stays_small():
    assert parameters(build_backbone("small", embedding_dim=128, image_size=(48, 48))) < 1_000_000
    narrow = build_backbone("small", embedding_dim=128, image_size=(48, 48), width=16)
    assert parameters(narrow) < 200_000


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_small_learns_a_toy_task(norm):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(8, 3, 16, 16, generator=generator)
    model = build_backbone("small", embedding_dim=16, image_size=(16, 16), width=8, norm=norm)
    classifier = nn.Linear(16, 8)
    optimizer = torch.optim.AdamW([*model.parameters(), *classifier.parameters()], lr=3e-3)
    for _ in range(60):
        labels = torch.randint(8, (32,), generator=generator)
        images = (prototypes[labels] + torch.randn(32, 3, 16, 16, generator=generator)) / 2
        loss = nn.functional.cross_entropy(classifier(model(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5  # log 8 = 2.08 at the start
    assert all(parameter.grad.any() for parameter in model.parameters())  # no block is dead from the start


@pytest.mark.parametrize("name", CPU_SIZED)
def test_too_small_an_image_is_refused(name):
    with pytest.raises(UsageError, match=r"7×40 pixels are too small .* needs (8×8|16×16)"):
        build_backbone(name, embedding_dim=8, image_size=(7, 40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widht": 3}, r"backbone\.options\.widht: .*its options are: width, norm"),
        ({"width": 12}, r"backbone\.options\.width: found 12; .*multiple of 8"),
        ({"width": "wide"}, r"backbone\.options\.width: found 'wide'; .*integer"),
        ({"norm": "layer"}, r"backbone\.options\.norm: found 'layer'; .*'batch', 'group' or 'none'"),
        ({"embedding_dim": 0}, r"backbone\.embedding_dim: found 0"),
        ({"name": "smal"}, r"backbone\.name: no backbone 'smal'; did you mean 'small'\? Known: iresnet18, "),
    ],
)
def test_wrong_options_are_refused_by_name(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        build_backbone(**{"name": "small", "embedding_dim": 8, "image_size": (32, 32), **options})
    assert "\n" not in str(caught.value)


def test_a_registered_backbone_is_built_by_name(monkeypatch):
    monkeypatch.setattr("pfc.engine.backbones.registry._factories", {})

    @register("linear")
    def linear(embedding_dim: int, image_size: tuple[int, int], bias: Annotated[bool, Field()] = True) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size[0] * image_size[1], embedding_dim, bias=bias))

    assert backbone_names() == ["linear"]
    model = build_backbone("linear", embedding_dim=5, image_size=(4, 6), bias=False)
    assert model(torch.zeros(2, 3, 4, 6)).shape == (2, 5)
    with pytest.raises(ValueError, match="two backbones"):
        register("linear")(linear)


@pytest.mark.parametrize("options", [{}, {"mask": 0.0, "drop_path": 0.0, "patch": 8}])
def test_vision_transformers_take_sizes_that_do_not_divide(options):
    model = build_backbone("vit_t", embedding_dim=24, image_size=(40, 33), **options)
    images = torch.rand(3, 3, 40, 33) * 2 - 1
    model(images).square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert ("mask_token" in trained) == (options == {})
    if not options:
        assert not torch.equal(model(images), model(images)), "other patches are masked, other branches left out"
    plain = model.eval()(images)
    assert torch.equal(plain, model(images))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images)
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(plain, half).min() > 0.98


def test_vision_transformers_have_the_sizes_of_the_common_ones():
    with torch.device("meta"):
        counts = {name: parameters(build_backbone(name, embedding_dim=512, image_size=(112, 112))) for name in VITS}
    blocks = {name: depth * (12 * width**2 + 10 * width) for name, (width, depth) in VITS.items()}
    for name, (width, _) in VITS.items():
        stem = 3 * 81 * width + width + 144 * width + width
        head = 2 * width + 144 * width * width + 2 * width + width * 512 + 2 * 512
        assert counts[name] == blocks[name] + stem + head, name


VITS = {"vit_t": (256, 12), "vit_s": (512, 12), "vit_b": (512, 24), "vit_l": (768, 24)}


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match=r"options\.patch: images of 8×40 pixels hold no patch of 9×9"):
        build_backbone("vit_t", embedding_dim=8, image_size=(8, 40))
    with pytest.raises(UsageError, match=r"options\.mask: 0\.9 of 4 patches leaves none"):
        build_backbone("vit_t", embedding_dim=8, image_size=(18, 18), mask=0.9)


TIMM = [("vit_tiny_patch16_224", (40, 48)), ("mobilenetv3_small_050", (33, 50)), ("resnet10t", (32, 32))]


@pytest.mark.parametrize(("name", "size"), TIMM)
def test_models_of_timm_give_embeddings(name, size):
    pytest.importorskip("timm")
    model = build_backbone(f"timm/{name}", embedding_dim=24, image_size=size)
    images = torch.rand(3, 3, *size) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = model(images)
    assert (embeddings.dtype, embeddings.shape) == (torch.float32, (3, 24))
    embeddings.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    numbers = block_numbers(model)
    assert numbers.keys() == dict(model.named_parameters()).keys()
    assert numbers["fc.weight"] == max(numbers.values()) > 1
    assert min(numbers.values()) == 0


def test_timm_sees_images_as_its_own_weights_do():
    pytest.importorskip("timm")
    model = build_backbone("timm/resnet10t", embedding_dim=8, image_size=(32, 32), norm="none").eval()
    seen = []
    model.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = torch.randint(256, (2, 3, 32, 32)) / 255
    model(pixels * 2 - 1)
    told = model.model.pretrained_cfg
    mean, std = (torch.tensor(told[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(seen[0], (pixels - mean) / std)


def test_timm_s_own_weights_fit_another_image_size():
    timm = pytest.importorskip("timm")
    weights = timm.create_model("vit_tiny_patch16_224", num_classes=10).state_dict()
    model = build_backbone("timm/vit_tiny_patch16_224", embedding_dim=8, image_size=(48, 32))
    translated = model.translate(weights)
    result = model.load_state_dict(translated, strict=False)
    assert set(result.unexpected_keys) == {"model.head.weight", "model.head.bias"}
    assert {name.partition(".")[0] for name in result.missing_keys} == {"fc", "features"}
    assert torch.equal(model.model.blocks[3].mlp.fc1.weight, weights["blocks.3.mlp.fc1.weight"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm/resnet10", {}, r"has no model 'resnet10'; did you mean resnet10"),
        ("timm/nothing_such", {}, r"has no model 'nothing_such'; timm\.list_models\(\)"),
        ("timm/resnet10t", {"foo": 1}, r"cannot build resnet10t .*'foo'"),
        ("timm/resnet10t", {"pretrained": True}, r"options\.pretrained: give the file as init\.path"),
        ("timm/resnet10t", {"global_pool": ""}, r"the model gives \[1, 512, 1, 1\] .*global_pool"),
        ("timm/resnet10t", {"norm": "group"}, r"options\.norm: found 'group'; allowed: batch, layer, none"),
    ],
)
def test_what_timm_cannot_do_is_refused(name, options, message):
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match=message) as caught:
        build_backbone(name, embedding_dim=8, image_size=(32, 32), **options)
    assert "\n" not in str(caught.value)


def test_without_timm_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"resnet10t is timm's, .* not installed: pip install 'pfc\[timm\]'"):
        build_backbone("timm/resnet10t", embedding_dim=8, image_size=(32, 32))


OWN = """
import torch
from torch import nn
from pydantic import Field
from typing import Annotated

def flat(embedding_dim: int, image_size: tuple[int, int], gain: Annotated[float, Field(gt=0)] = 1.0) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size[0] * image_size[1], embedding_dim))
    net[1].weight.data.mul_(gain)
    return net

def any_options(embedding_dim, image_size, **options):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size[0] * image_size[1], embedding_dim, **options))

def wrong(embedding_dim, image_size):
    return "a network"

def nothing(size):
    pass
"""


@pytest.fixture
def own_module(tmp_path):
    name = f"own_nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    path = list(sys.path)
    yield name
    sys.path[:] = path
    sys.modules.pop(name, None)


def test_a_function_of_one_s_own_is_a_backbone(own_module, tmp_path):
    model = build_backbone(f"{own_module}:flat", embedding_dim=5, image_size=(4, 6), folder=tmp_path, gain=2.0)
    assert model(torch.zeros(2, 3, 4, 6)).shape == (2, 5)
    bare = build_backbone(f"{own_module}:any_options", embedding_dim=5, image_size=(4, 6), folder=tmp_path, bias=False)
    assert bare[1].bias is None


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("flat", {"gian": 1.0}, r"backbone\.options\.gian: backbone 'own_nets_.*:flat' has no such option; .*: gain"),
        ("flat", {"gain": -1.0}, r"backbone\.options\.gain: found -1\.0"),
        ("flats", {}, r"\.py has no 'flats'; it has flat, any_options"),
        ("wrong", {}, r"gives a str, not a torch\.nn\.Module"),
        ("nothing", {}, r"is no backbone: it must be a function of embedding_dim and image_size"),
    ],
)
def test_a_function_that_is_no_backbone_is_refused(own_module, tmp_path, function, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        build_backbone(f"{own_module}:{function}", embedding_dim=5, image_size=(4, 6), folder=tmp_path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere_to_be:found", r"no module nowhere_to_be in the current folder .*PYTHONPATH"),
        ("os:system", r"os:system is no backbone"),
        ("subprocess:run", r"subprocess:run is no backbone"),
        ("a b:c", r"found 'a b:c'; write MODULE:NAME"),
        (":f", r"found ':f'; write MODULE:NAME"),
    ],
)
def test_names_that_lead_nowhere_are_refused(name, message):
    with pytest.raises(UsageError, match=message):
        build_backbone(name, embedding_dim=5, image_size=(4, 6))


def test_an_installed_package_offers_backbones(own_module, tmp_path, monkeypatch):
    about = tmp_path / "own_nets-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: own-nets\nVersion: 1.0\n")
    points = {"flat_one": f"{own_module}:flat", "broken": f"{own_module}:gone"}
    lines = [f"{name} = {value}" for name, value in points.items()]
    (about / "entry_points.txt").write_text("\n".join(["[pfc.backbones]", *lines]))
    monkeypatch.syspath_prepend(tmp_path)
    assert {"flat_one", "small"} <= set(backbone_names())
    assert build_backbone("flat_one", embedding_dim=5, image_size=(4, 6))[1].out_features == 5
    with pytest.raises(UsageError, match=r"broken of an installed package \(own_nets_.*:gone\)"):
        build_backbone("broken", embedding_dim=5, image_size=(4, 6))
