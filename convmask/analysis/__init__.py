"""What saved predictions are worth: by class, by size, image by image, and against another run."""

from convmask.analysis.comparison import compare
from convmask.analysis.dataset import AnalysedDataset
from convmask.analysis.run import RunAnalysis, analyse
from convmask.analysis.saved_results import SavedResults

__all__ = ["AnalysedDataset", "RunAnalysis", "SavedResults", "analyse", "compare"]
