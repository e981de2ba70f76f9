"""The folder for `nnUNet_extTrainer`, where the start-up hook cannot run: see `hyspark path`.

nnU-Net forgets every module that it imported from such a folder, so nothing but the one stub may lie here: real code
would be loaded twice, and its classes could neither be compared nor pickled.
"""
