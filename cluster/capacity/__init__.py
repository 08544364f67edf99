"""How much a build takes before it runs: units of work, time, bytes, memory, requests, pods. Arithmetic only, without Ray."""
