"What all trainings of a denoiser share: no weight is rounded, no other run or base is taken for one's own, the watch sees what the result will be."
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker, register_tracker_class
from diffusers import StableDiffusionPipeline
from test_sampler import tiny
from test_sft import SMALL, train, weights

from boig.core import BoigError, fingerprint
from boig.diffusion import tuning
from boig.diffusion.tuning import Tuning, averaged, step


class Notes(GeneralTracker):
    "A tracker that writes what it is told into a file; TensorBoard may not be installed."
    name, requires_logging_directory, tracker = "notes", True, None
    def __init__(self, project, folder): self.project, self.file = project, Path(folder)/"notes.txt"
    def note(self, *words):
        if PartialState().is_main_process:
            self.file.parent.mkdir(exist_ok=True)
            with open(self.file, "a") as f: print(*words, file=f)
    def start(self): self.note(self.project)
    def store_init_configuration(self, values): self.note("lr", values["lr"])
    def log(self, values, step=None, **_): self.note(step, "reward" if "reward" in values else "loss")
    def finish(self): self.note("finished")


register_tracker_class(Notes)


def everything(pipe): return {f"{part}.{n}": p.detach().clone() for part in ("unet", "vae", "text_encoder") for n, p in getattr(pipe, part).named_parameters()}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("lora", [0, 2])
def test_half_precision_rounds_no_weight(tmp_path, precision, lora):
    before = everything(tiny())
    pipe, _ = train(tmp_path, dataclasses.replace(SMALL, precision=precision, lora_rank=lora, lr=1e-12, weight_decay=0.0, epochs=1))
    after = {n.replace(".base_layer", ""): p for n, p in everything(pipe).items()}
    for n, p in before.items(): torch.testing.assert_close(after[n], p, rtol=0, atol=1e-9)
    if not lora: torch.testing.assert_close(everything(StableDiffusionPipeline.from_pretrained(tmp_path/"pipeline")), before, rtol=0, atol=1e-9)


def test_a_watch_may_draw_in_half_precision_and_give_numpy_numbers(tmp_path):
    def watch(pipe, epoch): return {"mean": np.float32(pipe("a cat", num_inference_steps=2, output_type="np").images.mean())}
    short = dataclasses.replace(SMALL, precision="bf16", epochs=1)
    train(tmp_path, short, watch=watch)
    _, log = train(tmp_path, dataclasses.replace(short, epochs=2), watch=watch)
    assert len(log) == 2 and log["mean"].notna().all()


def test_a_watch_sees_the_average_that_is_saved(tmp_path):
    seen = []
    train(tmp_path, dataclasses.replace(SMALL, ema=0.5), watch=lambda pipe, epoch: seen.append(weights(pipe).clone()) or {})
    torch.testing.assert_close(weights(StableDiffusionPipeline.from_pretrained(tmp_path/"pipeline")), seen[-1], rtol=0, atol=0)


@pytest.mark.parametrize("tracker", ["notes", "tensorboard"])
def test_a_tracker_is_told_each_epoch(tmp_path, monkeypatch, tracker):
    if tracker == "notes": monkeypatch.setattr(tuning, "get_available_trackers", lambda: ["notes"])
    else: pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install 'boig[track]'")
    train(tmp_path, dataclasses.replace(SMALL, tracker=tracker, epochs=1))
    if tracker == "notes": assert (tmp_path/"notes.txt").read_text().splitlines() == ["SFTConfig", f"lr {SMALL.lr}", "0 loss", "finished"]
    else: assert list((tmp_path/"SFTConfig").glob("events.*"))


@pytest.mark.parametrize("launched", [False, True])
def test_processes_take_a_gpu_each_and_one_alone_stays_where_the_pipeline_lies(tmp_path, monkeypatch, launched):
    asked = []
    def accelerator(cpu, **_): return asked.append(cpu) or SimpleNamespace(distributed_type="MULTI_GPU" if launched else "NO", mixed_precision="no", num_processes=3, device=torch.device("meta"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(tuning, "Accelerator", accelerator)
    monkeypatch.setattr(torch.optim, "AdamW", lambda params, **_: None) # it knows no "meta"
    run = Tuning(tiny(), tmp_path, SMALL, {})
    assert asked == [False] and run.device.type == run.pipe.unet.device.type == ("meta" if launched else "cpu")


def test_accelerate_started_for_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state()
    try:
        with pytest.raises(BoigError, match="set precision='bf16'"): Tuning(tiny(), tmp_path, SMALL, {})
        assert Tuning(tiny(), tmp_path, dataclasses.replace(SMALL, precision="bf16"), {}).half == torch.bfloat16
    finally: AcceleratorState._reset_state()
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        started = SimpleNamespace(distributed_type=kind, mixed_precision="no", num_processes=2)
        with pytest.raises(BoigError, match=f"started with {kind.value}.*plain multi-GPU"): tuning.check_launch(started, SMALL)


def one_step(grads, scale=None, ema=0.0, **settings):
    "A run of one number for each gradient, after a step of SGD with a learning rate of 1; `scale`: of fp16."
    p = torch.nn.Parameter(torch.ones(len(grads)))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    run = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1), params=[p], average=[torch.ones(len(grads))], bad=0, scaler=scaler,
                          optimizer=torch.optim.SGD([p], lr=1.0), config=dataclasses.replace(SMALL, ema=ema, **settings))
    scaler.scale((p * torch.tensor(grads)).sum()).backward()
    return run, step(run)


def test_gradients_are_clipped_or_not():
    run, norm = one_step([3.0, 4.0], grad_clip=0.1)
    torch.testing.assert_close(run.params[0].data, torch.tensor([1 - 0.06, 1 - 0.08]))
    assert norm == 5
    run, norm = one_step([3.0, 4.0], grad_clip=0.0)
    assert run.params[0].tolist() == [-2, -3] and norm == 5


def test_fp16_clips_the_gradient_and_not_its_scaled_one():
    plain, norm = one_step([3.0, 4.0], grad_clip=0.1)
    scaled, same = one_step([3.0, 4.0], scale=2.0**16, grad_clip=0.1)
    torch.testing.assert_close(scaled.params[0].data, plain.params[0].data)
    assert same == norm == 5


def test_the_average_follows_by_a_tenth():
    run, _ = one_step([1.0, 2.0], ema=0.9, grad_clip=0.0)
    torch.testing.assert_close(run.average[0], torch.tensor([0.9 * 1 + 0.1 * 0, 0.9 * 1 + 0.1 * -1]))


def test_the_optimiser_has_the_settings(tmp_path):
    group, = Tuning(tiny(), tmp_path, dataclasses.replace(SMALL, lr=2e-4, beta2=0.95, weight_decay=0.3), {}).optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-4, (0.9, 0.95), 0.3)


@pytest.mark.parametrize("wrong", [dict(lr=0.0), dict(lr=-1e-4), dict(lr=float("nan")), dict(grad_clip=-1.0)], ids=str)
def test_steps_that_lead_nowhere_are_refused(wrong):
    with pytest.raises(BoigError, match="lr must be above 0, and grad_clip at least 0"): Tuning.check(tiny(), dataclasses.replace(SMALL, **wrong))


def test_averaged_puts_everything_back_after_an_error():
    class Run: params, average = [torch.nn.Parameter(torch.ones(2))], [torch.zeros(2)]
    with pytest.raises(ValueError):
        with averaged(Run):
            assert Run.params[0].eq(0).all()
            raise ValueError
    assert Run.params[0].eq(1).all() and Run.average[0].eq(0).all()


@pytest.mark.parametrize("lora", [0, 2])
def test_another_base_is_another_run(tmp_path, lora):
    config = dataclasses.replace(SMALL, lora_rank=lora, epochs=1)
    train(tmp_path, config)
    other = tiny()
    with torch.no_grad(): next(other.unet.parameters()).mul_(-1) # as large as before
    with pytest.raises(BoigError, match="another model .* freshly loaded"): train(tmp_path, config, other)
    assert not getattr(other.unet, "peft_config", {}) # and it is left as it was
    kept = torch.load(tmp_path/"checkpoint.pt", weights_only=True)
    kept["plan"].pop("model")
    torch.save(kept, tmp_path/"checkpoint.pt")
    train(tmp_path, config, other) # a checkpoint that does not say


def test_lora_in_the_pipeline_is_not_set_aside_unseen(tmp_path):
    pipe, _ = train(tmp_path/"a", dataclasses.replace(SMALL, lora_rank=2, epochs=1))
    for rank in (0, 2):
        with pytest.raises(BoigError, match="fuse_lora"): train(tmp_path/"b", dataclasses.replace(SMALL, lora_rank=rank), pipe)


def test_fingerprints_tell_mirrored_and_negated_numbers_apart():
    x = torch.rand(3, 4, 4)
    names = {fingerprint([x]), fingerprint([-x]), fingerprint([x.flip(-1)]), fingerprint([x.flip(0)])}
    assert len(names) == 4 and fingerprint([x]) == fingerprint([x.clone()])


@pytest.mark.parametrize("lora", [0, 2])
def test_a_pipeline_of_half_precision_is_saved_whole(tmp_path, lora):
    "What was learned is smaller than what bf16 rounds off; each network gets its own precision back."
    pipe = tiny().to(torch.bfloat16)
    pipe.vae.to(torch.float32)  # as people keep it, against NaN
    seen = []
    with pytest.warns(UserWarning, match="bfloat16 again.*has it whole"):
        train(tmp_path, dataclasses.replace(SMALL, lora_rank=lora, lr=1e-5), pipe, watch=lambda p, epoch: seen.append({n: x.detach().clone() for n, x in p.unet.named_parameters()}) or {})
    assert (pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    file = tmp_path/("adapter/pytorch_lora_weights.safetensors" if lora else "pipeline/unet/diffusion_pytorch_model.safetensors")
    saved, learned = list(safetensors.torch.load_file(file).values()), [x for n, x in seen[-1].items() if not lora or "lora" in n]
    assert len(saved) == len(learned) > 10 and all(any(torch.equal(a, x) for a in saved) for x in learned)
