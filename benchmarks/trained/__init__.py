"""Small networks that are trained here, on data that is made here: what accuracy is measured on, without a download.

``data.py`` makes the data, ``nets.py`` has the networks (tests may build smaller ones: every class takes a width),
``training.py`` trains, ``recipes.py`` says which network is trained on what, and keeps what was trained.
"""
