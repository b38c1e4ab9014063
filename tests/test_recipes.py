"""The pages of docs/ tell the truth: their code runs, their files are read, their commands do what they say.

In the folder where they run, `Qwen/Qwen3-0.6B` and `trl-lib/ultrafeedback_binarized` are folders with a tiny model of
that architecture and with a few pairs, which the libraries take before they would ask the hub. OpenRLHF, LLaMA-Factory,
axolotl and RLHFlow are not installed: their pages' code runs on models with their forward passes and batches, and the
gradients are compared with those of eager NormBT.
"""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference

pytest.importorskip("trl")

from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from normbt_kernels.commands.cli import main
from normbt_kernels.integrations.head import last_token
from tests.processes import run_ranks
from tests.tiny_classifiers import HIDDEN, PAD, make_batch, make_model
from tests.tiny_pairs import EOS, make_tokenizer

pytestmark = pytest.mark.slow

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page, language):
    text = (DOCS / f"{page}.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def files(page):
    """The files that a page shows in full, by name: blocks under a line that ends in the name and a colon."""
    text = (DOCS / f"{page}.md").read_text()
    return dict(re.findall(r"`([\w.]+)`:\n+```\w+\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))


def run(page, **names):
    """Runs the page's Python blocks, one after the other, in one namespace."""
    for block in blocks(page, "python"):
        exec(compile(block, f"docs/{page}.md", "exec"), names)
    return names


def promised_logs(page):
    """The names in the first sentence of the page's entry on logs."""
    (entry,) = re.findall(
        r"^- \*\*Logs\*\*: (.*?)\.\s", (DOCS / f"{page}.md").read_text(), flags=re.DOTALL | re.MULTILINE
    )
    return set(re.findall(r"`(\w+)`", entry))


def logged(trainer):
    return {name for entry in trainer.state.log_history for name in entry}


# --- a folder to run them in ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    hub_model, hub_data = folder / "Qwen" / "Qwen3-0.6B", folder / "trl-lib" / "ultrafeedback_binarized"
    make_model("qwen3", pad_token_id=None).save_pretrained(hub_model)
    make_tokenizer().save_pretrained(hub_model)
    hub_data.mkdir(parents=True)
    answers = [(f"w{6 + i % 13} w7", f"w{5 + i % 11}") for i in range(96)]
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": "w5 ", "chosen": good, "rejected": bad}) + "\n" for good, bad in answers)
    )
    with (hub_data / "train.jsonl").open("w") as lines:
        for answer in answers:
            chosen, rejected = ([message("user", "w5"), message("assistant", text)] for text in answer)
            lines.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
    for page in ("distributed", "trl"):
        for name, text in files(page).items():
            (folder / name).write_text(text.replace("num_processes: 8", "num_processes: 2"))
    return folder


def message(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def inside(playground, monkeypatch):
    monkeypatch.chdir(playground)
    monkeypatch.setenv("CI", "1")  # TRL then reports no usage
    return playground


def launched(command, folder, **environment):
    """Runs a shell command of a page; what it prints."""
    python_path = os.pathsep.join([str(DOCS.parent), os.environ.get("PYTHONPATH", "")])
    offline = {"HF_HUB_OFFLINE": "1", "CI": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | offline | {"PATH": path} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- pages whose libraries are here --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(playground):
    """The page of Trainer, run to its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(playground)
        return run("transformers")


def test_transformers_page(trained, playground):
    trainer = trained["trainer"]
    assert promised_logs("transformers") <= logged(trainer)
    assert trainer.pair_loss.num_updates == trainer.state.global_step > 0
    assert (playground / "runs" / "qwen3" / "model.safetensors").is_file()
    (checkpoint,) = (playground / "runs" / "qwen3").glob("checkpoint-*")
    assert torch.equal(torch.load(checkpoint / "normbt.pt")["mu"], trainer.pair_loss.mu)
    chosen, rejected, _ = trainer.predict(trained["pairs"]["test"].select([0])).predictions
    by_hand = trained["chosen_reward"], trained["rejected_reward"]
    assert by_hand == pytest.approx((chosen.item(), rejected.item()), rel=1e-4)


def test_whole_step_page(inside):
    """It compares its own rewards."""
    assert run("whole-step")["rewards"].shape == (2, 1)


def test_rewardbench_page(trained, inside):
    commands = "".join(blocks("rewardbench", "bash"))
    (command,) = re.findall(r"^normbt (.*)", commands, flags=re.MULTILINE)
    assert main(command.split()) == 0
    Path("runs/qwen3-rewardbench").rename("runs/by-command")
    run("rewardbench")
    written = {path.name: path.read_bytes() for path in Path("runs/by-command").iterdir()}
    assert written == {path.name: path.read_bytes() for path in Path("runs/qwen3-rewardbench").iterdir()}
    assert "rope_theta" in json.loads(written["config.json"])


def test_trl_page(inside, monkeypatch):
    trainers = []
    trained_by = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, *args: (trainers.append(self), trained_by(self, *args))[1])
    run("trl")
    ours, theirs = trainers
    assert promised_logs("trl") <= logged(ours)
    assert ours.pair_loss.num_updates == ours.state.global_step > 0
    assert type(theirs).__module__.startswith("trl.")
    assert theirs.model.score.normbt.num_updates == theirs.state.global_step > 0
    (checkpoint,) = Path("runs/qwen3-apply").glob("checkpoint-*")
    extra = load_file(checkpoint / "model.safetensors").keys() - make_model("qwen3").state_dict().keys()
    assert extra == {"score.normbt.mu", "score.normbt.num_updates"}


# TRL's script destroys the process group under a living DistributedDataParallel, and gloo's threads now and then never
# end. What is asked here was done before.
END_WITHOUT_GLOO = """
    sys.stdout.flush()
    os._exit(0)
"""


def accelerate_launch(words):
    """What `accelerate launch` makes of its command line: the arguments, and the environment of each rank."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    environment = prepare_multi_gpu_env(arguments)
    return arguments, {name: environment[name] for name in environment.keys() - os.environ.keys()}


def test_trl_command_line_on_two_ranks_under_ddp_yaml(playground, monkeypatch):
    (command,) = [block for block in blocks("trl", "bash") if "reward_normbt.py" in block]
    script = playground / "reward_normbt.py"
    call = "    reward.main("
    assert call in script.read_text()
    before = "    import os, sys\n\n    NormBTRewardTrainer.end = lambda self: None\n"
    script.write_text(script.read_text().replace(call, before + call) + END_WITHOUT_GLOO)
    monkeypatch.chdir(playground)
    words = shlex.split(command.replace("\\\n", "").partition("accelerate launch")[2])
    words += ["--use_cpu", "--max_steps", "2", "--logging_steps", "1", "--report_to", "none"]
    launch, environment = accelerate_launch(words)
    module, arguments = launch.training_script.removesuffix(".py"), launch.training_script_args
    outputs = run_ranks(launch.num_processes, module, *arguments, cwd=playground, CI=1, **environment)
    assert "'mu':" in outputs[0]
    assert (playground / "runs" / "qwen3-cli" / "checkpoint-2" / "rng_state_1.pth").is_file()  # there was a rank 1
    assert (playground / "runs" / "qwen3-cli" / "checkpoint-2" / "normbt.pt").is_file()


def test_index_page_resumes_plain_bt_with_lora(tmp_path):
    class BTTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            chosen, rejected = model(**inputs).logits[:, 0].chunk(2)
            return -F.logsigmoid(chosen - rejected).mean()

    def train(steps, callbacks, resume=None):
        torch.manual_seed(0)
        config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
        args = TrainingArguments(
            tmp_path, max_steps=steps, per_device_train_batch_size=1, save_steps=2, use_cpu=True, report_to=[],
            disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        batches = [make_batch(seed=seed) for seed in range(4)]
        model = get_peft_model(make_model(), config)
        BTTrainer(model, args, lambda rows: rows[0], batches, callbacks=callbacks).train(resume_from_checkpoint=resume)
        return model

    callback = run("README")["ApplyNormBT"]
    plain = train(2, [])
    resumed = train(2, [callback()], str(tmp_path / "checkpoint-2"))  # no step is left
    for parameter, expected in zip(resumed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    train(4, [callback()], str(tmp_path / "checkpoint-2"))
    saved = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert saved["base_model.model.score.normbt.num_updates"] == 2


@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp2.yaml", "zero3.yaml"])
def test_accelerate_reads_the_file(name, playground, monkeypatch):
    from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(playground / name), "train.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    assert load_config_from_file(str(playground / name)).num_processes == 2
    if name == "zero3.yaml":
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    for variable in environment.keys() - os.environ.keys():
        monkeypatch.setenv(variable, environment[variable])
    if name == "fsdp2.yaml":
        plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.state_dict_type.name) == (2, "FULL_STATE_DICT")
    elif name == "zero3.yaml":
        plugin = DeepSpeedPlugin()
        assert (plugin.zero_stage, plugin.zero3_save_16bit_model) == (3, True)
        assert plugin.hf_ds_config.get_value("gradient_accumulation_steps") == "auto"
    else:
        assert arguments.multi_gpu


def test_accelerate_reads_zero3_json(playground):
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    config = HfDeepSpeedConfig(str(playground / "zero3.json"))
    assert config.is_zero3()
    assert not config.is_offload()
    assert config.get_value("train_batch_size") == "auto"  # for Trainer to fill in


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero3_yaml_trains_on_two_ranks(playground):
    """With the line that a machine without GPUs needs, before the script of the Trainer page."""
    gloo = 'from accelerate import PartialState\n\nPartialState(backend="gloo")\n'
    state = 'accelerator_config={"use_configured_state": True},'
    script = blocks("transformers", "python")[0].replace('"runs/qwen3",', f'"runs/zero3",\n        {state}')
    (playground / "train_zero3.py").write_text(f"{gloo}{script}\nprint('fused:', trainer.fused)\n")
    launcher = f"{sys.executable} -m accelerate.commands.launch --config_file zero3.yaml --mixed_precision no"
    assert "fused: False" in launched(f"{launcher} train_zero3.py", playground, DS_ACCELERATOR="cpu")


def test_axolotl_configuration_names_the_plugin_of_the_page():
    import yaml

    shown = files("axolotl")
    (plugin,) = yaml.safe_load(shown["reward.yaml"])["plugins"]
    module, _, name = plugin.partition(".")
    assert f"class {name}(" in shown[f"{module}.py"]


# --- pages whose frameworks are not: the same forward pass, batch and loss -------------------------------------------


class ScoresLastOfMask(nn.Module):
    """OpenRLHF's reward model: the backbone, a head named score, the reward of the last token of the mask."""

    def __init__(self):
        super().__init__()
        classifier = make_model()
        self.config, self.model, self.score = classifier.config, classifier.model, classifier.score

    def forward(self, input_ids, attention_mask=None, return_output=False):
        outputs = self.model(input_ids, attention_mask=attention_mask)
        rewards = self.score(outputs.last_hidden_state).squeeze(-1)
        rewards = rewards.gather(1, last_token(attention_mask)[:, None]).squeeze(1)
        return (rewards, outputs) if return_output else rewards


class ValueHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout, self.summary = nn.Dropout(0.1), nn.Linear(HIDDEN, 1)

    def forward(self, hidden):
        return self.summary(self.dropout(hidden))


class ValueHeadModel(nn.Module):
    """LLaMA-Factory's: a language model, and a value head named v_head that scores every token."""

    def __init__(self):
        super().__init__()
        self.config = make_model().config
        torch.manual_seed(0)
        self.pretrained_model, self.v_head = LlamaForCausalLM(self.config), ValueHead()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        outputs = self.pretrained_model(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return outputs.logits, None, self.v_head(outputs.hidden_states[-1]).squeeze(-1)


def openrlhf_rewards(model, batch):
    return model(batch["input_ids"], attention_mask=batch["attention_mask"], return_output=True)[0]


def llama_factory_rewards(model, batch):
    values = model(**batch, output_hidden_states=True, return_dict=True, use_cache=False)[2]
    return values.gather(1, batch["attention_mask"].sum(dim=1, keepdim=True) - 1).squeeze(1)


def classifier_rewards(model, batch):
    return model(**batch).logits[:, 0]


def assert_trains_with_normbt(model, eager, head, rewards_of, layout, side="right"):
    """BT's gradients of the model are NormBT's of `eager`, its copy without NormBT, over batches whose mu matters."""
    rows, ema = [], reference.DistanceEMA()
    eager.get_submodule(head).register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    for seed in range(3):
        inputs = make_batch(4, seed=seed, side=side)
        last = last_token(inputs["attention_mask"])
        inputs["input_ids"][torch.arange(8), last] = EOS  # which some take for the pad token too
        inputs["input_ids"].masked_fill_(inputs["attention_mask"] == 0, model.config.pad_token_id)
        chosen, rejected = reference.pair_rows(8, layout)
        rewards = rewards_of(model, inputs)
        (-F.logsigmoid(rewards[chosen] - rewards[rejected]).mean()).backward()

        rewards = rewards_of(eager, inputs)
        pooled = reference.pool(rows.pop().detach(), last)
        rho = reference.pair_distance(pooled, layout)
        weight = reference.normbt_weight(rho, ema.weight_mean(rho))
        ema.update(rho)
        (-weight * F.logsigmoid(rewards[chosen] - rewards[rejected])).mean().backward()
        for (name, parameter), expected in zip(model.named_parameters(), eager.parameters(), strict=True):
            assert (parameter.grad is None) == (expected.grad is None), name
            if expected.grad is not None:
                torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(model.get_submodule(head).normbt.mu, ema.mu)


@pytest.mark.parametrize("pad_token_id", [PAD, EOS], ids=["own pad token", "pad is eos"])
def test_openrlhf_page(pad_token_id):
    model = ScoresLastOfMask().train()
    model.config.pad_token_id = pad_token_id
    eager = copy.deepcopy(model)
    run("openrlhf", model=model)
    assert_trains_with_normbt(model, eager, "score", openrlhf_rewards, "halves", side="left")


@pytest.mark.parametrize("pad_token_id", [PAD, EOS], ids=["own pad token", "pad is eos"])
def test_llama_factory_page(pad_token_id, monkeypatch, tmp_path):
    model, started = ValueHeadModel().train(), []
    model.config.pad_token_id = pad_token_id
    eager = copy.deepcopy(model)
    eager.v_head.dropout.p = 0.0

    def run_exp(args=None, callbacks=None):  # LLaMA-Factory hands them to its subclass of Trainer
        assert all(isinstance(callback, TrainerCallback) for callback in callbacks)
        started.append(
            Trainer(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True), callbacks=callbacks)
        )

    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=run_exp)
    run("llama-factory", __name__="__main__")
    assert started
    assert_trains_with_normbt(model, eager, "v_head.summary", llama_factory_rewards, "halves")


def test_axolotl_page(monkeypatch):
    class BasePlugin:
        def post_model_load(self, cfg, model):
            raise NotImplementedError

    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=BasePlugin)
    model = make_model("qwen3")
    eager = copy.deepcopy(model)
    run("axolotl")["NormBT"]().post_model_load({}, model)
    assert_trains_with_normbt(model, eager, "score", classifier_rewards, "halves")


def test_rlhflow_page():
    model = make_model("gemma")
    eager = copy.deepcopy(model)
    run("rlhflow", model=model)
    assert_trains_with_normbt(model, eager, "score", classifier_rewards, "interleaved")


def stand_in(monkeypatch, path, **names):
    """A module `path` that holds `names`, in packages that hold nothing."""
    parts = path.split(".")
    for depth in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(parts[depth - 1]))
    for name, value in names.items():
        setattr(sys.modules[path], name, value)


# --- all pages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page.stem for page in PAGES])
def test_json_and_yaml_parse(page):
    import yaml

    for block in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)
    for block in blocks(page, "json"):
        json.loads(block)
