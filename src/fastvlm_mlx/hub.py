def resolve(model, **k):
    from pathlib import Path
    return Path(model)
