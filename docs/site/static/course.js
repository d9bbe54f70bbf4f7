// A part that scrolls sideways must be reached by keyboard, too; one that doesn't need not be.
function reach() {
  for (const part of document.querySelectorAll(".md-typeset pre, .md-typeset .table")) {
    const scrolls = [part, ...part.querySelectorAll(":scope > code")].some((one) => one.scrollWidth > one.clientWidth)
    if (scrolls) part.tabIndex = 0
    else part.removeAttribute("tabindex")
  }
}

// A link to something inside a fold opens the fold.
function unfold() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)))
  for (let fold = target && target.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true
}

document.addEventListener("DOMContentLoaded", () => {
  reach()
  unfold()
  document.addEventListener("toggle", reach, true)
  addEventListener("resize", reach)
  addEventListener("hashchange", unfold)
})
