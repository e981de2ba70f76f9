"""Pre-training the way others compute it, to compare with."""

from nnunetv2_hyspark.sparse import DenseMaskLayout
from nnunetv2_hyspark.trainers.HySparKPretrainTrainer import HySparKPretrainTrainer


class HySparKDensePretrainTrainer(HySparKPretrainTrainer):
    """HySparKPretrainTrainer whose encoder computes whole maps and multiplies them by the mask, not visible blocks."""

    def initialize(self) -> None:
        """As its parent, with the other layout."""
        super().initialize()
        self.model.layout = DenseMaskLayout
