"""nnU-Net experiment planners of HySparK, installed as `nnunetv2_hyspark.planners`."""
