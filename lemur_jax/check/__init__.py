"""`lemur check`: a run's own data, model, attention and mesh, judged before it starts."""
