"""A convolutional network in Keras, on any backend and number of ranks.

KERAS_BACKEND=torch bnlayer launch -n 2 -- python examples/keras_digits.py
"""

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

import bnworker
from bnlayer.adapters.keras import BatchNormalization, reduce_gradients

images, labels = load_digits(return_X_y=True)
images, test = images.reshape(-1, 8, 8, 1).astype("float32") / 16, np.arange(len(labels)) % 5 == 0
rows = np.flatnonzero(~test)[:1408]  # 22 batches of 64, which divide evenly among the ranks

with bnworker.join() as world:
    keras.utils.set_random_seed(0)  # on every rank: the same weights, and the same order of its rows
    model = keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(16, 3, use_bias=False),
            BatchNormalization(synchronized=True, momentum=0.9, name="bn_1"),
            layers.ReLU(),
            layers.Conv2D(32, 3, use_bias=False),
            BatchNormalization(synchronized=True, momentum=0.9, name="bn_2"),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ]
    )
    optimizer = reduce_gradients(keras.optimizers.Adam(0.003))  # all weights by the ranks' mean gradient
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    mine = rows[world.rank :: world.world_size]
    model.fit(images[mine], labels[mine], batch_size=64 // world.world_size, epochs=5, verbose=0)
    _, accuracy = model.evaluate(images[test], labels[test], verbose=0)  # inference: no exchange
    if world.rank == 0:
        print(f"{keras.backend.backend()}, {world.world_size} rank(s): {accuracy:.1%} of the test rows", flush=True)
