package com.example;

/** A plant. */
public class Plant {}
