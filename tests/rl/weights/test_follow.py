"""An engine that follows a directory."""

import time

from speaker import speaker_model, speaker_tokenizer

from glm5.engine import Engine
from glm5.rl.weights import DirectoryPublisher
from glm5.rl.weights.follow import Follower


def wait_for(condition):
    for _ in range(12_000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")


def test_newer_weights_are_taken_and_damaged_ones_are_not(tmp_path, caplog):
    engine = Engine(speaker_model(), speaker_tokenizer(), num_blocks=16)
    follower = Follower(engine, tmp_path / "weights", poll_seconds=0.01)
    publisher = DirectoryPublisher(tmp_path / "weights")
    publisher.publish(2, speaker_model(seed=1).state_dict())
    wait_for(lambda: engine.version == 2)
    manifest = tmp_path / "elsewhere" / "v00000003" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{")
    manifest.parent.rename(tmp_path / "weights" / "v00000003")
    wait_for(lambda: "v00000003/manifest.json cannot be read" in caplog.text)
    time.sleep(0.05)
    assert engine.version == 2 and caplog.text.count("cannot be read") == 1
    update = engine.update_weights

    def short_of_memory(*arguments):
        engine.update_weights = update
        raise RuntimeError("out of memory")

    engine.update_weights = short_of_memory
    again = DirectoryPublisher(tmp_path / "weights")
    again.publish(4, speaker_model(seed=2).state_dict())
    wait_for(lambda: "weights: out of memory" in caplog.text)
    again.publish(5, speaker_model(seed=2).state_dict())
    wait_for(lambda: engine.version == 5)
    follower.close()
    engine.close()
