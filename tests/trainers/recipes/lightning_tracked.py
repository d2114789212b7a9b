"""A λmax curve of a training with Lightning, for three lines more."""

import lightning as L

import sharpkit as sk  # the first


def tracked_fit(module, train_loader, picture, n=500, **options):
    tracker = sk.Tracker(train_loader, n=n, every=10)  # the second
    callbacks = [sk.tracking.lightning_callback(tracker)]  # the third, for the trainer
    L.Trainer(callbacks=callbacks, **options).fit(module, train_loader)
    tracker.plot(picture)  # the curve; tracker.frame() has the numbers
    return tracker
