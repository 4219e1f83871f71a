"""The plain synchronous loop, single-turn and in one thread: the reference that the orchestrator's sync mode equals."""
