"""Image-level accuracy in percent as the paper reports it; the paper does not state the split.

Cui, Jiang, Shen, Liu, Liu: "Key Feature Dynamic Enhancement Network for Breast Cancer Pathological Image
Classification", Tables 1 to 3.
"""

PROTOCOL = "paper; split unstated"
MAGNIFICATIONS = ("40X", "100X", "200X", "400X")

TABLES: dict[str, dict[str, tuple[float, float, float, float]]] = {
    # Table 1
    "binary": {
        "VGG-16": (88.20, 87.90, 88.21, 86.32),
        "ResNet-50": (92.22, 93.40, 95.37, 91.34),
        "DenseNet-121": (92.61, 92.00, 93.93, 91.73),
        "BHCNET": (98.87, 99.04, 99.34, 98.99),
        "BreastNet": (97.99, 97.84, 98.51, 95.88),
        "AHoNet": (96.53, 97.47, 99.09, 96.52),
        "Hybrid CNN-LSTM": (99.03, 99.75, 99.64, 98.07),
        "KFDE": (99.74, 99.56, 99.60, 97.88),
    },
    # Table 2
    "subtype": {
        "VGG-16": (87.44, 85.45, 83.09, 82.54),
        "ResNet-50": (90.76, 88.82, 87.63, 87.25),
        "DenseNet-121": (91.02, 89.22, 87.38, 86.83),
        "BHCNET": (94.43, 94.45, 92.27, 91.15),
        "BreastNet": (93.97, 92.92, 91.23, 91.79),
        "Hybrid CNN-LSTM": (96.50, 92.60, 88.94, 92.51),
        "GLNET": (90.01, 92.32, 91.98, 91.51),
        "KFDE": (96.35, 94.52, 92.64, 92.67),
    },
}
# Table 3. Its last row equals Table 2's, so it must be about the subtypes.
ABLATION: dict[str, tuple[float, float, float, float]] = {
    "baseline": (95.24, 93.55, 91.55, 90.67),
    "CSFE": (96.12, 93.60, 92.11, 91.76),
    "MFDF": (95.75, 93.73, 92.23, 92.00),
    "KFDE": (96.35, 94.52, 92.64, 92.67),
}
