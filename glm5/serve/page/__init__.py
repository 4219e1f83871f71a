"""The page at `/`: a conversation in the browser. Plain HTML, CSS and JavaScript modules, no build step."""

from glm5.serve.page.routes import install_page

__all__ = ["install_page"]
