"""Between the event loop and the engine: loading, the engine thread, queues and admission."""
