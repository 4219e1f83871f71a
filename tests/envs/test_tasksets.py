"""Tasksets of verifiers: with the package itself where it is installed, else with what it does written down here.

The package needs 70 others, so it is no dependency of the tests. `pip install verifiers` and run this file to hold the
adapter against the real one; `Recorded` is the part of verifiers 0.4.0 that the adapter uses.
"""

import importlib
import importlib.util
import sys
import types

import pytest
from episodes import assert_pure, play, said

from glm5.cli.rl_environments import named_environment
from glm5.envs import Environment, EnvironmentFailure, taskset_environment
from glm5.errors import InputError

REAL = importlib.util.find_spec("verifiers") is not None


class Recorded:
    """Modules that stand in for `verifiers.v1` when the package is not there."""

    def __init__(self, monkeypatch):
        from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

        class Loose(BaseModel):
            model_config = ConfigDict(extra="allow")

        class TasksetConfig(BaseModel):
            model_config = ConfigDict(extra="forbid")
            id: str = ""
            task: Loose = Loose()

        class TaskData(BaseModel):
            model_config = ConfigDict(frozen=True)
            idx: int | None = None
            name: str | None = None
            prompt: str | list[Loose] | None = None
            system_prompt: str | None = None

        class Score(BaseModel):
            score: float
            weight: float

            @property
            def value(self):
                return self.score * self.weight

        class Trace(BaseModel):
            task: Loose
            agent: Loose
            nodes: list[Loose]
            is_completed: bool
            ok: bool
            rewards: dict[str, Score | None] = Field(default_factory=dict)

            @property
            def last_reply(self):
                return [node.message.content for node in self.nodes if node.sampled][-1].strip()

            @property
            def reward(self):
                return sum(reward.value for reward in self.rewards.values())

        class Task:
            NEEDS_CONTAINER = False

            def __init__(self, data, config=None):
                self.data, self.config, self.key, self.hash = data, config or Loose(), "key", "hash"

            @classmethod
            def __class_getitem__(cls, _):
                return cls

            @classmethod
            def toolsets(cls, config):
                return []

            async def setup(self, trace, runtime): ...

            async def finalize(self, trace, runtime): ...

            def hooks(self, kind):
                names = [name for name in dir(type(self)) if getattr(getattr(type(self), name), kind, False)]
                return [getattr(self, name) for name in names]

            async def score(self, trace):
                for hook in self.hooks("reward"):
                    trace.rewards[hook.__name__] = None
                    trace.rewards[hook.__name__] = Score(score=await hook(trace=trace), weight=hook.weight)

        class Taskset:
            def __init__(self, config):
                self.config = config

            @classmethod
            def __class_getitem__(cls, arguments):
                return type(cls.__name__, (cls,), {"__orig_config__": arguments[1]})

            @classmethod
            def toolsets(cls, config):
                return []

            def __iter__(self):
                for idx, task in enumerate(self.load()):
                    task.data = task.data.model_copy(update={"idx": idx})
                    yield task

        def exported(name):
            module = importlib.import_module(name.replace("-", "_"))
            return next(getattr(module, one) for one in module.__all__)

        def reward(weight=1.0):
            def mark(function):
                function.reward, function.weight = True, weight
                return function

            return mark

        agent = types.SimpleNamespace(AgentConfig=Loose)
        graph = types.SimpleNamespace(MessageNode=Loose)
        trace = types.SimpleNamespace(AgentInfo=Loose, Trace=Trace, TraceTask=lambda **fields: Loose())
        modules = {"configs": None, "configs.agent": agent, "graph": graph, "trace": trace,
                   "types": types.SimpleNamespace(Message=Loose), "task": types.SimpleNamespace(Task=Task)}  # fmt: skip
        self.v1 = types.SimpleNamespace(
            Task=Task, TaskData=TaskData, Taskset=Taskset, TasksetConfig=TasksetConfig, reward=reward
        )
        assert TypeAdapter(Loose).validate_python({"role": "user"}).role == "user"
        monkeypatch.setitem(sys.modules, "verifiers", types.ModuleType("verifiers"))
        monkeypatch.setitem(sys.modules, "verifiers.v1", types.ModuleType("verifiers.v1"))
        vars(sys.modules["verifiers.v1"]).update(
            taskset_config_type=lambda name: exported(name).__orig_config__,
            load_taskset=lambda config: exported(config.id)(config),
        )
        for name, found in modules.items():
            module = types.ModuleType(f"verifiers.v1.{name}")
            vars(module).update(vars(found) if found else {})
            monkeypatch.setitem(sys.modules, f"verifiers.v1.{name}", module)


@pytest.fixture
def vf(monkeypatch):
    if REAL:
        import verifiers.v1

        return verifiers.v1
    return Recorded(monkeypatch).v1


def addition(vf, **members):
    """A taskset of ten sums as its documentation writes them; `members` go into the task's class."""

    class Data(vf.TaskData):
        answer: int

    class Addition(vf.Task[Data]):
        @vf.reward(weight=2.0)
        async def right(self, trace) -> float:
            return float(trace.last_reply == str(self.data.answer))

        @vf.reward(weight=0.5)
        async def short(self, trace) -> float:
            return float(len(trace.last_reply) < 5)

    for name, member in members.items():
        setattr(Addition, name, member)

    class Config(vf.TasksetConfig):
        count: int = 10

    class Additions(vf.Taskset[Addition, Config]):
        def load(self):
            for i in range(self.config.count):
                data = Data(name="easy", prompt=f"What is {i} + {i}?", system_prompt="Only the number.", answer=2 * i)
                yield Addition(data)

    return Additions(Config())


def test_their_prompts_are_scored_by_their_rewards(vf):
    env: Environment = taskset_environment(addition(vf))
    assert_pure(env, count=10)
    assert len({env.task(0, i).messages for i in range(0)} | {str(env.task(0, i).messages) for i in range(10)}) == 10
    task = env.task(0, 0)
    system, user = task.messages
    assert system == {"role": "system", "content": "Only the number."} and task.category == "easy"
    number = int(user["content"].split()[2])
    seen, reward = play(env, task, said(str(2 * number), reasoning="12345 twice"))
    assert seen[-1].done and reward.value == 2.5 and reward.reason in ("right 2, short 0.5", "short 0.5, right 2")
    assert play(env, task, said("-1"))[1].value == 0.5
    assert play(env, task, said("I do not know"))[1].value == 0.0


def test_a_reward_that_raises_is_a_failure(vf):
    @vf.reward(weight=1.0)
    async def broken(self, trace) -> float:
        raise RuntimeError("the judge is away")

    env = taskset_environment(addition(vf, broken=broken))
    with pytest.raises(EnvironmentFailure, match="the judge is away"):
        play(env, env.task(0, 0), said("1"))


def test_what_takes_more_than_a_conversation_is_refused(vf):
    @vf.reward(weight=1.0)
    async def files(self, trace, runtime) -> float:
        return 0.0

    async def setup(self, trace, runtime):
        return None

    for members, words in [
        ({"files": files}, "a runtime for files"),
        ({"setup": setup}, "a runtime for its setup"),
        ({"NEEDS_CONTAINER": True}, "a container"),
        ({"toolsets": classmethod(lambda cls, config: ["search"])}, "tool servers"),
    ]:
        with pytest.raises(InputError, match=f"Additions needs {words}; run it in its own harness"):
            taskset_environment(addition(vf, **members))


# ---- by name --------------------------------------------------------------------------------------------------------
def test_an_installed_taskset_by_its_name(vf, monkeypatch):
    package = types.ModuleType("my_additions")
    package.Additions, package.__all__ = type(addition(vf)), ["Additions"]
    monkeypatch.setitem(sys.modules, "my_additions", package)
    # A module made here has no file to be found by; an installed one has.
    package.__spec__ = importlib.machinery.ModuleSpec("my_additions", None)
    named = named_environment("verifiers:my-additions:count=3@2")
    assert named.weight == 2 and named.short == "verifiers:my-additions:count=3"
    assert len({named.environment.task(0, i).messages[1]["content"] for i in range(9)}) == 3
    assert "my-additions" in named.environment.name and '"count":3' in named.environment.name
    task = named.environment.task(0, 0)
    number = int(task.messages[1]["content"].split()[2])
    assert play(named.environment, task, said(str(2 * number)))[1].value == 2.5

    for text, words in [
        ("verifiers:", "Which taskset"),
        ("verifiers:no-such-taskset", "'no-such-taskset' of verifiers cannot be imported .*no_such_taskset.* install"),
        ("verifiers:my-additions:size=3", "'my-additions' of verifiers cannot be made: .*size"),
        ("verifiers:my-additions:count=many", "cannot be made: .*count"),
        ("verifiers:my-additions:count=0", "Additions loads no task"),
        ("verifiers:my-additions:api_key=hush", "setting api_key .* secret"),
        ("verifiers:my-additions:count=3,token=hush", "setting token .* secret"),
    ]:
        with pytest.raises(InputError, match=words):
            named_environment(text)
    with pytest.raises(InputError, match=r"my-additions would measure .*split=test"):
        named_environment("verifiers:my-additions:count=3", split="heldout")
    with pytest.raises(InputError, match=r"cannot be made: .*split"):  # of those that have one it is a setting
        named_environment("verifiers:my-additions:split=test", split="heldout")


def test_without_the_package_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(InputError, match="need that package: pip install verifiers"):
        named_environment("verifiers:gsm8k")
