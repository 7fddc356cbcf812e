/** Client of the API. */
import { price } from "./prices.js";
import type { Request } from "express";
// interface NotAnInterface {}

export const VERSION: string = "1";

export interface Answer<T> extends Base<T> {
  value: T;
  read(): T;
}

export type Id = string | number;

export enum State { Open, Closed }

/** Talks to the server. */
export abstract class Client implements Answer<number> {
  value = price([]);
  constructor(private readonly url: string) {}
  abstract send(id: Id): Promise<void>;
  read(): number {
    const text = "class AlsoNotAClass {}";
    return text.length;
  }
}

export async function fetchAll(request: Request): Promise<any> {
  for (const a of [1]) {
    for (const b of [2]) {
      await fetch(`${a}${b}`);
    }
  }
}

namespace Inner {
  export function helper(): void {}
}
