"""How good predictions are, beside what would be had for nothing.

    entities          whole entities, as conlleval counts them
    classification    precision, recall, F1 of labels; accuracy, MCC, confusion matrix
    generated         translations and answers: BLEU, exact match, F1 over words
    report            all of it as a text that cannot mislead, and as metrics.json
    plot              the confusion matrix and the F1 of each label as a picture

They know labels and texts, no model. Perplexity and bits per byte, which need one, are in
`tasks.evaluate`. The modules are imported by name; scikit-learn, sacrebleu and matplotlib are
loaded where they are used.
"""
