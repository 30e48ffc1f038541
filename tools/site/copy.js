// A button on every block of code that copies it; what a cell has shown gets none.
if (navigator.clipboard) for (const block of document.querySelectorAll('div.highlight')) {
  const pre = block.querySelector('pre')
  if (!pre || block.closest('.cell_output')) continue
  const button = Object.assign(document.createElement('button'), {className: 'copy', type: 'button', textContent: 'Copy'})
  button.setAttribute('aria-label', 'Copy this code')
  button.addEventListener('click', async () => {
    try { await navigator.clipboard.writeText(pre.textContent.replace(/\n$/, '')); button.textContent = 'Copied' }
    catch { button.textContent = 'Not allowed' }
    setTimeout(() => { button.textContent = 'Copy' }, 1500)
  })
  block.append(button)
}
