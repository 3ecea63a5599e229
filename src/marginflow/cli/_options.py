"""Help that several commands share."""

DATA = "Data set: digits:3,8, mnist:3,8, separable:n=60,d=20,margin=0.1, npz:PATH."
FLOW_DATA = DATA.replace(",margin=0.1", "")  # its column is too narrow for more
DATA_DIR = "Folder with the MNIST files (or set MARGINFLOW_DATA)."
MODEL = "Network: mlp:1024,64 (hidden widths), cnn, deep-linear:10,10."
ATTACK = "Trained against: none, fgsm:eps=16/255, fgm:eps=1.5, pgd-linf:eps=0.1,steps=5."
DEVICE = "Device: cpu, cuda."
THREADS = "CPU threads; results are the same bits only at the same number."
