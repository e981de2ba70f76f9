"""nnU-Net trainers of HySparK, installed as `nnunetv2_hyspark.trainers`."""
