"""A gateway that learns samples from the model itself."""

from gateway_tools import USER, ask, gateway
from scripted import ScriptedSource
from speaker import speaker_model, speaker_tokenizer

from glm5.engine import Engine, SamplingParams
from glm5.rl.gateway import OwnDistribution
from glm5.rl.gateway.session import own_distribution


def test_a_learning_gateway_samples_from_the_model_itself_whatever_is_asked(tmp_path):
    seen = []
    engine = Engine(speaker_model(), speaker_tokenizer())
    for run in range(2):
        source = OwnDistribution(engine, seed=5)
        with gateway(tmp_path / str(run), source=source, own_sampling=True) as running:
            for name in ("a", "b"):
                for _ in range(2):
                    ask(running.openai(name), USER, temperature=0, seed=3)
            assert all(recorded.learnt for name in "ab" for recorded in running.sessions.find(name).turns)
            seen.append([turn.output_ids for name in "ab" for turn in running.turns(name)])
    assert seen[0] == seen[1] and len(set(seen[0])) == 4
    params = SamplingParams(temperature=0.3, logit_bias={4: 2.0}, bad_sequences=[[5]], max_tokens=5, stop="x")
    stream = OwnDistribution(engine).stream([40, 41], params, session_id="s", priority=0, deadline=None)
    stream.close()
    engine.close()
    source = ScriptedSource("one two")
    OwnDistribution(source).stream([40, 41], params, session_id="s", priority=0, deadline=None)
    assert not own_distribution(params) and own_distribution(source.params[0])
    assert source.params[0].bad_sequences == () and source.params[0].stop == ("x",)
