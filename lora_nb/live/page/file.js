// A browser loads no modules from files: say so, instead of a dead page.
if (location.protocol === 'file:') {
  var p = document.getElementById('error')
  p.textContent = 'A browser does not start this page from a file. Serve the folder: python -m http.server, then open the address that it prints.'
  p.hidden = false
}
