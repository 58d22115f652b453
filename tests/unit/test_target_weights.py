"""The target's embedding and LM head as drafters use them equal the target's own modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from specdec.contract.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError
from specdec.contract.target_state import SharedMemory, StateStorage, TensorRef
from specdec.runtime.memory import PrivateMemory, Region, SharedHostMemory
from specdec.runtime.state_files import SharedDirectory
from specdec.state.mapped_file import MappedFile
from specdec.state.weights import TargetWeights, TargetWeightsRef, read_weights, share_weights
from tests.tiny_models import VOCAB_SIZE, tiny_config

CPU = torch.device("cpu")
TOKENS = torch.tensor([[0, 5, 257, VOCAB_SIZE - 1], [5, 5, 1, 2]])


def with_(config: PreTrainedConfig, **changes: Any) -> PreTrainedConfig:
    for name, value in changes.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    return config


TARGETS = {
    "llama": lambda: with_(tiny_config("llama"), tie_word_embeddings=False),
    "llama tied": lambda: with_(tiny_config("llama"), tie_word_embeddings=True),
    "gemma3": lambda: with_(tiny_config("gemma3"), final_logit_softcapping=3.0),
    "gemma4": lambda: with_(tiny_config("gemma4"), final_logit_softcapping=5.0),
    "gemma4-shared-kv": lambda: tiny_config("gemma4-shared-kv"),
}


@pytest.fixture(scope="module", params=TARGETS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TARGETS[request.param](), dtype=torch.float32)
    path = tmp_path_factory.mktemp("weights")
    model.save_pretrained(path)
    return path


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest, folder: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=request.param)
    return loaded


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[SharedHostMemory]:
    memory = SharedHostMemory(SharedDirectory(tmp_path), strict=True)
    yield memory
    memory.close()


def mapped(ref: TargetWeightsRef, directory: SharedDirectory) -> TargetWeights:
    """Return the weights as another process has them."""
    tensors = []
    for tensor in (ref.embedding, ref.lm_head):
        assert isinstance(tensor.storage, SharedMemory)
        file = MappedFile(directory, tensor.storage.path)
        tensors.append(file.tensor(tensor, tensor.storage.offset))
        file.close()
    return TargetWeights(*tensors, ref.embedding_scale, ref.final_logit_softcap)


@torch.inference_mode()
def assert_are_the_models(weights: TargetWeights, model: PreTrainedModel) -> None:
    """Check that the weights give, bit for bit, what the model makes of token ids and of hidden states."""
    assert torch.equal(weights.embed(TOKENS), model.get_input_embeddings()(TOKENS))
    kept = {}
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: kept.update(hidden=inputs[0]))
    logits = model(TOKENS).logits
    hook.remove()
    assert torch.equal(weights.logits(kept["hidden"]), logits)
    assert logits.abs().max() > 1


def test_mapped_weights_are_the_models_and_the_model_is_unchanged(
    model: PreTrainedModel, memory: SharedHostMemory, tmp_path: Path
) -> None:
    with torch.inference_mode():
        before = model(TOKENS).logits
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    ref = share_weights(model, memory, "target")
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits, before)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    assert ref.model_id == "target"
    is_tied = model.config.get_text_config().tie_word_embeddings
    assert (replace(ref.embedding, name="") == replace(ref.lm_head, name="")) == is_tied
    again = TargetWeightsRef.from_proto(ref.to_proto())
    assert again == ref
    directory = SharedDirectory(tmp_path)
    weights = mapped(again, directory)
    assert weights.embedding.dtype == model.dtype
    assert_are_the_models(weights, model)
    # It is the model's own memory, not a copy.
    with torch.inference_mode():
        model.get_input_embeddings().weight[5] += 1
        assert torch.equal(weights.embedding[5], model.get_input_embeddings().weight[5])
    assert len(list(directory.path.iterdir())) == 1


def test_weights_of_a_checkpoint_are_the_models(model: PreTrainedModel, folder: Path) -> None:
    weights = read_weights(folder, model.dtype, CPU)
    assert weights.embedding.dtype == model.dtype
    assert_are_the_models(weights, model)


def test_private_memory_shares_nothing_and_copies_nothing(model: PreTrainedModel) -> None:
    before = model.get_input_embeddings().weight.data_ptr()
    ref = share_weights(model, PrivateMemory(CPU), "target")
    assert ref.embedding.storage is ref.lm_head.storage is None
    assert model.get_input_embeddings().weight.data_ptr() == before


class SmallMemory(PrivateMemory):
    """Room for so many bytes."""

    kind = StateStorage.SHARED_MEMORY

    def __init__(self, num_bytes: int) -> None:
        super().__init__(CPU)
        self.num_free = num_bytes

    def allocate(self, num_bytes: int) -> Region:
        if num_bytes > self.num_free:
            raise ResourceExhaustedError("no room")
        self.num_free -= num_bytes
        return super().allocate(num_bytes)


def test_room_for_one_of_two_weights_is_not_used_up() -> None:
    model = AutoModelForCausalLM.from_config(TARGETS["llama"](), dtype=torch.float32)
    memory = SmallMemory(model.get_input_embeddings().weight.nbytes + 1000)
    num_free = memory.num_free
    for _ in range(2):
        with pytest.raises(ResourceExhaustedError):
            share_weights(model, memory, "target")
        assert memory.num_free == num_free


def test_no_other_tensor_of_a_checkpoint_is_read(tmp_path: Path) -> None:
    """Two tensors lie in files of their own; the files of all others are damaged."""
    model = AutoModelForCausalLM.from_config(TARGETS["llama"](), dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="34KB")
    needed, damaged = 0, 0
    for path in sorted(tmp_path.glob("*.safetensors")):
        names = set(load_file(path))
        if names & {"model.embed_tokens.weight", "lm_head.weight"}:
            needed += 1
        else:
            path.write_bytes(b"\0" * path.stat().st_size)
            damaged += 1
    assert (needed, damaged > 0) == (2, True)
    weights = read_weights(tmp_path, torch.float32, CPU)
    assert_are_the_models(weights, model)


def test_what_holds_no_such_weights_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(TARGETS["llama"](), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file)
    with pytest.raises(NotFoundError, match="has 0 tensors that could be"):
        read_weights(tmp_path, torch.float32, CPU)
    model.lm_head = torch.nn.Linear(32, VOCAB_SIZE, bias=True)
    with pytest.raises(InvalidArgumentError, match="has a bias"):
        share_weights(model, PrivateMemory(CPU), "target")


def test_logits_are_capped_as_the_model_caps_them() -> None:
    lm_head = torch.eye(4) * 10
    weights = TargetWeights(lm_head, lm_head, final_logit_softcap=3.0)
    logits = weights.logits(torch.ones(1, 4))
    torch.testing.assert_close(logits, torch.full((1, 4), 3 * float(torch.tanh(torch.tensor(10 / 3)))))
    ref = TensorRef("embedding", "float32", (4, 4))
    message = TargetWeightsRef("m", ref, ref, 1.0, 3.0).to_proto()
    message.embedding_scale = 0  # unset
    assert TargetWeightsRef.from_proto(message).embedding_scale == 1.0
