"""A server that speaks OpenEnv 0.10's WebSocket protocol: the frames that its `http_server.py` sends, no more.

The game: say numbers that add up to a target that the seed fixes.
"""

import time

from fastapi import FastAPI, WebSocket, WebSocketDisconnect


def observation(text, reward=None, done=False):
    found = {"observation": {"text": text, "metadata": {}}, "reward": reward, "done": done}
    return {"type": "observation", "data": found}


def error(message, code, **more):
    return {"type": "error", "data": {"message": message, "code": code, **more}}


class Server:
    """The app, and what it saw."""

    def __init__(self):
        self.app = FastAPI()
        self.app.websocket("/ws")(self.session)
        self.open, self.most, self.frames = 0, 40, []

    def wait(self):
        """Until all sessions have come to their ends here too: a client's is earlier."""
        while self.open:
            time.sleep(0.01)

    async def session(self, socket: WebSocket):
        await socket.accept()
        if self.open >= self.most:
            await socket.send_json(error("no place is free", "CAPACITY_REACHED"))
            await socket.close()
            return
        self.open += 1
        left = 0
        try:
            while True:
                frame = await socket.receive_json()
                self.frames.append(frame)
                if frame["type"] == "close":
                    break
                if frame["type"] == "reset":
                    left = frame["data"]["seed"] % 10 + 1
                    await socket.send_json(observation(f"{left} are missing"))
                elif frame["data"].get("add") == 13:
                    await socket.send_json(error("thirteen", "EXECUTION_ERROR"))
                elif frame["data"].get("add") == 14:
                    break
                elif not isinstance(frame["data"].get("add"), int):
                    errors = [{"msg": "Input should be a valid integer", "loc": ["add"]}]
                    await socket.send_json(error("Invalid message", "VALIDATION_ERROR", errors=errors))
                else:
                    left -= frame["data"]["add"]
                    await socket.send_json(observation(f"{left} are missing", float(left == 0), left <= 0))
        except WebSocketDisconnect:
            pass
        finally:
            self.open -= 1
        try:
            await socket.close()
        except RuntimeError:
            pass
