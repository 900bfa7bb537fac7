// What a tab remembers when its page is loaded again. Browsers may forbid storage: then it forgets.
export function recall(name) {
  try {
    return JSON.parse(sessionStorage.getItem(`firstlight.${name}`)) ?? {};
  } catch {
    return {};
  }
}

export function remember(name, value) {
  try {
    sessionStorage.setItem(`firstlight.${name}`, JSON.stringify(value));
  } catch {
    // Forbidden, or full: it lasts as long as the page does.
  }
}
