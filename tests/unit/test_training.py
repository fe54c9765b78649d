"""The training loop against a float64 AdamW of its own, and how it stops and goes on."""

import copy
import math

import pytest
import torch
from torch import nn

from ppcl.errors import UserError
from ppcl.settings import DistillSettings, Settings
from ppcl.storage import tensors
from ppcl.training import loop
from support.loop_parts import OPTIONS, Stop, stop_at, weights


class Part(nn.Module):
    """A linear map, with a weight that no loss uses and one that is not trained."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.bias = nn.Parameter(torch.randn(3, generator=generator))
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def loss(self, x):
        return (x @ self.weight.T + self.bias + self.frozen).square().mean()


def data(step, scale):
    return scale * torch.randn(5, 4, generator=torch.Generator().manual_seed(100 + step))


def losses_of(parts, scales, before=lambda _step: None, change=lambda _n, _s, loss: loss):
    def losses(step):
        before(step)
        for name, part in parts.items():
            loss = change(name, step, part.loss(data(step, scales[name])))
            yield name, loss, {"twice": 2 * loss.detach()}

    return losses


def parts(*names):
    return {name: Part(ord(name)) for name in names}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


SCALES = {"a": 1.0, "b": 30.0}  # the gradients of b are cut, those of a mostly are not


@pytest.fixture
def train(accelerator, tmp_path):
    def call(modules, options=OPTIONS, identity="one", **more):
        losses = losses_of(modules, SCALES, **more)
        path = tmp_path / "state" / "checkpoint.safetensors"
        return loop.train(modules, losses, options, accelerator, path, identity)

    return call


def test_learning_rate_in_closed_form():
    options = loop.Optimisation(steps=110, lr=0.5, warmup_steps=10)
    rates = [options.lr_at(step) for step in range(110)]
    assert rates[:10] == pytest.approx([0.05 * n for n in range(1, 11)])
    assert rates[10] == 0.5 and rates[60] == pytest.approx(0.25)
    assert rates[35] == pytest.approx(0.25 * (1 + math.sqrt(0.5)))
    assert 0 < rates[109] < 2e-4 and options.lr_at(110) == pytest.approx(0)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert loop.Optimisation(steps=2, lr=1.0).lr_at(0) == 1
    assert loop.Optimisation(steps=2, lr=1.0, warmup_steps=4).lr_at(1) == 0.5


def test_options_come_from_larger_settings():
    settings = DistillSettings.of({"lr": 0.1, "betas": [0.8, 0.9], "loss": "mixed", "steps": 5})
    options = loop.Optimisation.from_settings(settings.replace(steps=7))
    assert (options.lr, options.steps, options.betas) == (0.1, 7, (0.8, 0.9))


def reference(part, scale, options):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) in float64, with clipping by global norm."""
    w = {n: getattr(part, n).detach().double().clone() for n in ("weight", "bias")}
    m, v = ({n: torch.zeros_like(t) for n, t in w.items()} for _ in range(2))
    beta_1, beta_2 = options.betas
    norms = []
    for step in range(options.steps):
        x = data(step, scale).double()
        out = x @ w["weight"].T + w["bias"] + 1
        slope = 2 * out / out.numel()
        gradient = {"weight": slope.T @ x, "bias": slope.sum(0)}
        norm = math.sqrt(sum(g.square().sum().item() for g in gradient.values()))
        norms.append(norm)
        for name, g in gradient.items():
            g = g * min(1.0, options.clip_norm / norm)
            m[name] = beta_1 * m[name] + (1 - beta_1) * g
            v[name] = beta_2 * v[name] + (1 - beta_2) * g.square()
            mean = m[name] / (1 - beta_1 ** (step + 1))
            spread = (v[name] / (1 - beta_2 ** (step + 1))).sqrt() + 1e-8
            lr = options.lr_at(step)
            w[name] = (1 - lr * options.weight_decay) * w[name] - lr * mean / spread
    return w, norms


def test_updates_are_those_of_adamw_with_clipping_per_module(train):
    modules, start = parts("a", "b"), parts("a", "b")
    rows = train(modules)
    for name, module in modules.items():
        expected, norms = reference(start[name], SCALES[name], OPTIONS)
        for key, value in expected.items():
            torch.testing.assert_close(
                getattr(module, key).detach().double(), value, rtol=1e-5, atol=1e-5
            )
        logged = [row["gradient_norm"] for row in rows if row["name"] == name]
        # Steps 1-3, 4 (a checkpoint), 5-6, 7-8 (a checkpoint), 9, 10-12 are averaged.
        ends = [0, 3, 4, 6, 8, 9, 12]
        for norm, low, high in zip(logged, ends, ends[1:], strict=False):
            assert norm == pytest.approx(sum(norms[low:high]) / (high - low), rel=1e-3)
    assert [row["step"] for row in rows] == [s for s in (3, 4, 6, 8, 9, 12) for _ in "ab"]
    assert all(row["twice"] == pytest.approx(2 * row["loss"], rel=1e-6) for row in rows)
    assert [row["lr"] for row in rows[::2]] == [OPTIONS.lr_at(row["step"] - 1) for row in rows[::2]]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)


def test_parameters_without_gradients_stay_as_they_are(train):
    modules = parts("a")
    train(modules)
    assert modules["a"].unused.tolist() == [1, 1] and modules["a"].frozen.tolist() == [1]


def test_a_module_ends_the_same_whoever_trains_beside_it(train):
    alone, together = parts("a"), parts("a", "b")
    train(alone, identity="alone")
    train(together, identity="together")
    assert same(weights(alone), weights({"a": together["a"]}))


def test_resumed_is_uninterrupted_to_the_bit(train):
    whole = parts("a", "b")
    rows = train(whole, identity="whole")
    for stops in ([5], [4], [3, 6, 11], [9, 9]):
        modules = parts("a", "b")
        for step in stops:
            with pytest.raises(Stop):
                train(modules, identity=str(stops), before=stop_at(step))
            modules = parts("a", "b")  # a new process starts from the start weights
        ran = []
        again = train(modules, identity=str(stops), before=ran.append)
        assert ran[0] == stops[-1] // 4 * 4
        assert same(weights(modules), weights(whole)), stops
        untimed = [{k: v for k, v in row.items() if k != "seconds"} for row in again]
        assert untimed == [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_an_average_is_that_of_its_recurrence_and_resumes_to_the_bit(train, tmp_path):
    options = loop.Optimisation(**vars(OPTIONS) | {"ema": 0.7})
    modules, plain = parts("a", "b"), parts("a", "b")
    expected = weights(plain)

    def follow(done):  # what is seen before a step is what the steps done so far made
        decay = min(0.7, done / (done + 9)) if done > 1 else 0.0
        for key, value in weights(plain).items() if done else ():
            expected[key] = decay * expected[key] + (1 - decay) * value

    train(plain, before=follow, identity="plain")
    follow(OPTIONS.steps)
    train(modules, options, identity="whole")
    for key, value in weights(modules).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)
    assert not same(weights(modules), weights(plain))
    again = parts("a", "b")
    with pytest.raises(Stop):
        train(again, options, before=stop_at(6), identity="killed")
    again = parts("a", "b")
    train(again, options, identity="killed")
    assert same(weights(again), weights(modules))
    finished = parts("a", "b")  # killed after its last step
    train(finished, options, before=stop_at(0), identity="killed")
    assert same(weights(finished), weights(modules))


def test_a_resumed_log_has_only_the_metrics_that_a_module_had(train, accelerator, tmp_path):
    """As where one new block of a text run has a text stream and another has none."""

    def losses(stop):
        modules = parts("a", "b")

        def each(step):
            stop(step)
            for name, loss, metrics in losses_of(modules, SCALES)(step):
                yield name, loss, metrics if name == "a" else {}

        return modules, each

    logs = []
    for stop in (stop_at(9), lambda _step: None):
        try:
            modules, each = losses(stop)
            path = tmp_path / "c.safetensors"
            logs.append(loop.train(modules, each, OPTIONS, accelerator, path, "one"))
        except Stop:
            pass
    ((*rows,),) = logs
    assert len(rows) == 12 and all(("twice" in row) == (row["name"] == "a") for row in rows)


def test_a_foreign_checkpoint_is_ignored(train, tmp_path, caplog):
    with pytest.raises(Stop):
        train(parts("a"), identity="other", before=stop_at(6))
    assert (tmp_path / "state" / "checkpoint.safetensors").exists()
    modules, whole = parts("a"), parts("a")
    ran = []
    train(modules, identity="mine", before=ran.append)
    assert ran == list(range(12)) and "belongs to other settings" in caplog.text
    (tmp_path / "state" / "checkpoint.safetensors").unlink()
    train(whole, identity="mine")
    assert same(weights(modules), weights(whole))


def test_a_truncated_checkpoint_is_named(train, tmp_path):
    with pytest.raises(Stop):
        train(parts("a"), before=stop_at(6))
    path = tmp_path / "state" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="checkpoint.safetensors is not a whole safetensors file"):
        train(parts("a"))


def spoil(how):
    def change(name, step, loss):
        return how(loss) if (name, step) == ("b", 5) else loss

    return change


@pytest.mark.parametrize(
    ("how", "word"),
    [
        (lambda loss: loss * math.nan, "nan"),
        (lambda loss: loss * math.inf, "inf|nan"),
        # A finite loss whose gradient is not: the root's slope at zero.
        (lambda loss: (loss * 0).sqrt(), "inf|nan"),
    ],
)
def test_nan_is_named_and_never_saved(train, tmp_path, how, word):
    modules = parts("a", "b")
    with pytest.raises(UserError, match=rf"of 'b' became ({word}) between training steps 5 and 6"):
        train(modules, change=spoil(how))
    state, metadata = tensors.read(tmp_path / "state" / "checkpoint.safetensors")
    assert metadata["step"] == "4"
    assert all(torch.isfinite(t).all() for key, t in state.items() if key != "log")
    # What the message promises: the next run goes on from there.
    again, whole = parts("a", "b"), parts("a", "b")
    train(again)
    train(whole, identity="whole")
    assert same(weights(again), weights(whole))


def test_nan_just_before_a_checkpoint_is_not_saved(train, tmp_path):
    options = loop.Optimisation(steps=12, lr=0.1, checkpoint_every=3, log_every=1000)
    with pytest.raises(UserError, match="between training steps 4 and 6"):
        train(parts("a", "b"), options, change=spoil(lambda loss: loss * math.nan))
    _, metadata = tensors.read(tmp_path / "state" / "checkpoint.safetensors")
    assert metadata["step"] == "3"


def test_identity_is_of_code_settings_teacher_and_contents(tmp_path):
    path, script, folder = tmp_path / "input", tmp_path / "stage.py", tmp_path / "teacher"
    path.write_bytes(b"one")
    script.write_text("print(1)")
    (folder / "vae").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKL"]}')

    def identity(path=path, lr=1):
        settings = {"distill": {"lr": lr}, "teacher": {"path": str(folder)}}
        return loop.identity(script, Settings.of(settings), [path])

    first = identity()
    copied = tmp_path / "elsewhere"
    copied.write_bytes(b"one")
    assert identity(copied) == first
    assert identity(lr=2) != first
    script.write_text("print(2)")
    assert identity() != first
    script.write_text("print(1)")
    assert identity() == first
    (folder / "vae/weights").write_bytes(b"other")
    assert identity() != first
    (folder / "vae/weights").unlink()
    path.write_bytes(b"two")
    assert identity() != first


def test_training_leaves_no_half_written_file(train, tmp_path):
    modules = parts("a")
    kept = copy.deepcopy(modules["a"].state_dict())
    train(modules)
    assert [f.name for f in (tmp_path / "state").iterdir()] == ["checkpoint.safetensors"]
    assert not torch.equal(kept["weight"], modules["a"].weight)
