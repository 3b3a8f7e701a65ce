from typing import Any

from reasoning_gym.dataset import ProceduralDataset

DATASETS: dict[str, tuple[type[ProceduralDataset], type[Any]]]  # {name: (dataset, its config)}

def create_dataset(name: str, **config: Any) -> ProceduralDataset: ...
