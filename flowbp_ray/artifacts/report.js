"use strict";
{
  const place = (input) => input.parentElement.style.setProperty("--cut", input.value + "%");
  const each = Array.from(document.querySelectorAll(".stack input"));
  for (const input of each) {
    input.addEventListener("input", () => place(input));
    place(input);
  }
  const all = document.getElementById("all");
  if (all) {
    all.addEventListener("input", () => {
      for (const input of each) {
        input.value = all.value;
        place(input);
      }
    });
  }
}
