"""CLIP's image encoder against its arithmetic written out here, for both published layouts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from triptych.checkpoints.convert import convert
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.folder import load_folder
from triptych.checkpoints.options import Options
from triptych.models.vision import VisionTransformer

Tensors = dict[str, Tensor]
WIDTH, LAYERS, PATCH, SIDE = 16, 2, 4, 3
HEADS = Options(vision_heads=2)


def openai() -> Tensors:
    """OpenAI's names, with the text tower."""
    shapes = {
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (SIDE**2 + 1, WIDTH),
        "visual.proj": (WIDTH, 8),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
        "positional_embedding": (7, 8),
        "text_projection": (8, 8),
        "logit_scale": (),
        "token_embedding.weight": (11, 8),
        "ln_final.weight": (8,),
        "transformer.resblocks.0.ln_1.weight": (8,),
    }
    norms = ["visual.ln_pre", "visual.ln_post"]
    for i in range(LAYERS):
        block = f"visual.transformer.resblocks.{i}"
        norms += [f"{block}.ln_1", f"{block}.ln_2"]
        shapes |= {f"{block}.attn.in_proj_weight": (3 * WIDTH, WIDTH), f"{block}.attn.in_proj_bias": (3 * WIDTH,)}
        shapes |= {f"{block}.attn.out_proj.weight": (WIDTH, WIDTH), f"{block}.attn.out_proj.bias": (WIDTH,)}
        shapes |= {f"{block}.mlp.c_fc.weight": (4 * WIDTH, WIDTH), f"{block}.mlp.c_fc.bias": (4 * WIDTH,)}
        shapes |= {f"{block}.mlp.c_proj.weight": (WIDTH, 4 * WIDTH), f"{block}.mlp.c_proj.bias": (WIDTH,)}
    shapes |= {f"{norm}.{part}": (WIDTH,) for norm in norms for part in ("weight", "bias")}
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def transformers(openai: Tensors, prefix: str = "vision_model.") -> Tensors:
    """The same image encoder under transformers' names."""
    table = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "ln_pre": "pre_layrnorm",
        "ln_post": "post_layernorm",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "transformer.resblocks": "encoder.layers",
    }
    tensors: Tensors = {}
    for name, tensor in openai.items():
        if not name.startswith("visual.") or name == "visual.proj":
            continue
        name = name.removeprefix("visual.")
        for theirs, ours in table.items():
            name = name.replace(theirs, ours)
        if "in_proj" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                tensors[prefix + name.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = part.clone()
        else:
            tensors[prefix + name] = tensor.clone()
    return tensors


def reference(tensors: Tensors, pixels_BCHW: Tensor, activation: str, eps: float = 1e-5) -> Tensor:
    """openai/CLIP's VisionTransformer with ln_post on every token, in functions of torch alone."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    x = F.conv2d(pixels_BCHW, tensors["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([tensors["visual.class_embedding"].expand(len(x), 1, WIDTH), x], 1)
    x = norm(x + tensors["visual.positional_embedding"], "visual.ln_pre")
    for i in range(LAYERS):
        block = f"visual.transformer.resblocks.{i}"
        y = norm(x, f"{block}.ln_1")
        qkv = y @ tensors[f"{block}.attn.in_proj_weight"].T + tensors[f"{block}.attn.in_proj_bias"]
        heads = [part.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2) for part in qkv.chunk(3, -1)]
        weights = (heads[0] @ heads[1].transpose(-1, -2) / (WIDTH // 2) ** 0.5).softmax(-1)
        y = (weights @ heads[2]).transpose(1, 2).flatten(2)
        x = x + y @ tensors[f"{block}.attn.out_proj.weight"].T + tensors[f"{block}.attn.out_proj.bias"]
        y = norm(x, f"{block}.ln_2") @ tensors[f"{block}.mlp.c_fc.weight"].T + tensors[f"{block}.mlp.c_fc.bias"]
        y = y * torch.sigmoid(1.702 * y) if activation == "quick_gelu" else 0.5 * y * (1 + torch.erf(y / 2**0.5))
        x = x + y @ tensors[f"{block}.mlp.c_proj.weight"].T + tensors[f"{block}.mlp.c_proj.bias"]
    return norm(x, "visual.ln_post")


def output(folder: Path, pixels_BCHW: Tensor) -> Tensor:
    loaded = load_folder(folder)
    assert isinstance(loaded.model, VisionTransformer)
    with torch.no_grad():
        return loaded.model(pixels_BCHW)


PIXELS = torch.linspace(-1, 1, 2 * 3 * 12 * 12).sin().view(2, 3, 12, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_openai(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in openai().items()}
    constants = {"input_resolution": torch.tensor(12), "context_length": torch.tensor(7), "vocab_size": torch.tensor(9)}
    torch.save({**tensors, **constants}, tmp_path / "ViT-B-16.tar")
    report = convert(tmp_path / "ViT-B-16.tar", tmp_path / "out", "clip", HEADS)
    wanted = reference({name: tensor.float() for name, tensor in tensors.items()}, PIXELS, "quick_gelu")
    torch.testing.assert_close(output(tmp_path / "out", PIXELS), wanted, atol=1e-5, rtol=1e-4)
    assert len(report.dropped) == 10
    assert ("float16 cast to float32" in report.notes) == (dtype == torch.float16)
    loaded = load_folder(tmp_path / "out")
    assert loaded.model_type == "clip-vision"
    assert loaded.preprocessing is not None
    assert (loaded.preprocessing.image_size, loaded.preprocessing.resize) == (12, "crop")
    assert loaded.config.layers == LAYERS


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_openai_torchscript(tmp_path: Path) -> None:
    tensors = openai()
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        module = root
        *path, last = name.split(".")
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, torch.nn.Parameter(tensor))
    torch.jit.save(torch.jit.script(root), tmp_path / "ViT-B-16.pt")
    convert(tmp_path / "ViT-B-16.pt", tmp_path / "out", "clip", HEADS)
    torch.testing.assert_close(
        output(tmp_path / "out", PIXELS), reference(tensors, PIXELS, "quick_gelu"), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_transformers(tmp_path: Path, nested: bool, activation: str) -> None:
    source = tmp_path / "clip-vit"
    source.mkdir()
    tensors = openai()
    theirs = transformers(tensors)
    theirs["vision_model.embeddings.position_ids"] = torch.arange(10)
    if nested:  # a CLIPModel, not just a CLIPVisionModel
        theirs |= {"text_model.final_layer_norm.weight": torch.zeros(3), "logit_scale": torch.zeros(())}
        theirs |= {"visual_projection.weight": torch.zeros(3, 3), "text_projection.weight": torch.zeros(3, 3)}
    save_file(theirs, source / "model.safetensors")
    vision = {"num_attention_heads": 2, "hidden_act": activation, "layer_norm_eps": 1e-3, "image_size": 12}
    (source / "config.json").write_text(json.dumps({"vision_config": vision} if nested else vision))
    report = convert(source, tmp_path / "out", "clip-hf")
    wanted = reference(tensors, PIXELS, activation, eps=1e-3)
    torch.testing.assert_close(output(tmp_path / "out", PIXELS), wanted, atol=1e-5, rtol=1e-4)
    assert len(report.dropped) == (5 if nested else 1)


def test_other_image_size(tmp_path: Path) -> None:
    torch.save(openai(), tmp_path / "clip.pt")
    report = convert(tmp_path / "clip.pt", tmp_path / "out", "clip", Options(vision_heads=2, image_size=20))
    assert output(tmp_path / "out", torch.zeros(1, 3, 20, 20)).shape == (1, 26, WIDTH)
    assert any("resized from 12 to 20" in note for note in report.notes)


def test_mistakes(tmp_path: Path) -> None:
    def said(tensors: Tensors, options: Options = HEADS, kind: str = "clip") -> str:
        torch.save(tensors, tmp_path / "clip.pt")
        with pytest.raises(CheckpointError) as caught:
            convert(tmp_path / "clip.pt", tmp_path / "out", kind, options)
        return str(caught.value)

    assert "CLIP with a ResNet" in said({"visual.layer1.0.conv1.weight": torch.zeros(1)})
    assert "--from clip-hf" in said(transformers(openai()))
    assert "--from clip)" in said(openai(), kind="clip-hf")
    assert "--vision-heads" in said(openai(), Options())
    assert "--stride does not apply to --from clip" in said(openai(), Options(stride=3))
    assert "--vocab does not apply" in said(openai(), Options(vocab=Path("vocab.txt")))
    assert "unknown kind 'blip'; known are mplug" in said(openai(), kind="blip")
    (tmp_path / "config.json").write_text('{"hidden_act": "relu"}')
    assert "'relu'" in said(transformers(openai()), kind="clip-hf")
