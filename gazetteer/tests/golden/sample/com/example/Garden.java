/* class NotAClass {} */
package com.example;

import java.util.List;
import com.example.Plant;
import org.junit.jupiter.api.Test;

/** A garden of plants. */
public class Garden extends Place implements Iterable<Plant> {
    /** Most plants. */
    public static final int LIMIT = 10;
    private final List<Plant> plants;

    public Garden(List<Plant> plants) {
        this.plants = plants;
    }

    /** Waters all. */
    @Override
    public void water() throws Exception {
        String text = "class InAString {}";
        for (Plant a : plants) {
            for (Plant b : plants) {
                new java.io.File(text);
                new FileReader(text);
            }
        }
        Runtime.getRuntime().exec("ls");
    }

    interface Bed { void dig(); }

    enum Season { SPRING, AUTUMN }

    record Tool(String name) {}
}
