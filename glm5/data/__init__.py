"""Data: sources, corpora, token datasets with manifests, the stateless loader, and the first generated problems."""

from glm5.data.chat import chat_documents
from glm5.data.corpus import Corpus, Document, build_corpus, open_corpus
from glm5.data.loader import IGNORED, Batch, Loader, once
from glm5.data.mixture import Mixture, Share, open_mixture
from glm5.data.shards import TokenDataset, TokenDocument, open_dataset, tokenize_corpus, write_dataset
from glm5.data.sources import Source, installed_sources
from glm5.data.warmup import BatchWarmup

__all__ = [
    "IGNORED", "Batch", "BatchWarmup", "Corpus", "Document", "Loader", "Mixture", "Share", "Source", "TokenDataset",
    "TokenDocument", "build_corpus", "chat_documents", "installed_sources", "once", "open_corpus", "open_dataset",
    "open_mixture", "tokenize_corpus", "write_dataset",
]  # fmt: skip
