/**
 * A shopping cart.
 * class NotAClass {}
 */
import fs from "fs";
import { price, tax as vat } from "./prices.js";
import * as path from "node:path";
// import nothing from "nowhere";
const lodash = require("lodash");

export const LIMIT = 99;

/** Holds items. */
export class Cart extends Base {
  #items = [];
  constructor(owner) {
    super(owner);
  }
  /** Adds one. */
  add(item) {
    this.#items.push(item);
  }
  async save() {
    return fs.writeFileSync(path.join("cart"), "function notAFunction() {}");
  }
}

/** The sum. */
export function total(cart) {
  return eval("1 + 1") + price(cart) + vat(cart) + lodash.size(cart);
}

const twice = (x) => 2 * x;

function* numbers() {
  yield twice(1);
}
