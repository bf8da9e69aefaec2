/* A JVM with a heap of objects, strings, a map and arrays, and a command loop: as heap.js is for node.
 *
 *     java Heap.java MIB
 *
 *     sum             a checksum that walks all of it
 *     mutate N SEED   changes N parts; the checksum is another one from then on
 *     quit            as does the end of input
 *
 * Each reply is one JSON line. Two threads make garbage meanwhile, so that the collector moves what lives.
 */
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.atomic.AtomicLong;

public final class Heap {
    static final class Item {
        final int id;
        final String name;
        final long[] scores;
        final Item parent;

        Item(int id, String name, long[] scores, Item parent) {
            this.id = id;
            this.name = name;
            this.scores = scores;
            this.parent = parent;
        }
    }

    static final class Part {
        final List<Item> items = new ArrayList<>();
        final Map<String, Integer> names = new HashMap<>();
        final byte[] bytes = new byte[300_000];
        private long x;

        Part(int seed) {
            x = seed + 1L;
            for (int i = 0; i < 2000; i++) {
                String name = "name " + next() + " of " + seed;
                items.add(new Item(i, name, new long[] {next(), next(), next()}, i > 0 ? items.get(i / 2) : null));
                names.put(name, i);
            }
            for (int i = 0; i < bytes.length; i++) {
                bytes[i] = (byte) next();
            }
        }

        private long next() {
            x = x * 6364136223846793005L + 1442695040888963407L;
            return x >>> 40;
        }

        long sum() {
            long sum = 17;
            for (Item item : items) {
                sum = sum * 31 + item.id + item.name.hashCode() + names.get(item.name);
                for (long score : item.scores) {
                    sum = sum * 31 + score;
                }
                sum = sum * 31 + (item.parent == null ? -1 : item.parent.id);
            }
            for (byte one : bytes) {
                sum = sum * 31 + one;
            }
            return sum;
        }
    }

    private static final List<Part> PARTS = new ArrayList<>();
    private static final AtomicLong ROUNDS = new AtomicLong();
    private static final byte[][] GARBAGE = new byte[64][];

    private static void litter(int offset) {
        for (long n = 0; !Thread.currentThread().isInterrupted(); n++) {
            GARBAGE[(int) (n % 32) + offset] = new byte[20_000];
            ROUNDS.incrementAndGet();
            try {
                Thread.sleep(0, 200_000);
            } catch (InterruptedException interrupted) {
                return;
            }
        }
    }

    private static void mutate(int n, int seed) {
        for (int i = 0; i < n; i++) {
            Part part = PARTS.get((seed * 7 + i * 13) % PARTS.size());
            part.items.get((seed * 31 + i) % part.items.size()).scores[1] += seed + 1;
            part.bytes[(seed * 4099 + i) % part.bytes.length] ^= (byte) (1 + (seed & 63));
        }
    }

    private static void answer(String rest) {
        System.out.println("{\"ok\": true" + rest + "}");
        System.out.flush();
    }

    public static void main(String[] arguments) throws Exception {
        long wanted = Long.parseLong(arguments[0]) << 20;
        Runtime runtime = Runtime.getRuntime();
        while (runtime.totalMemory() - runtime.freeMemory() < wanted) {
            PARTS.add(new Part(PARTS.size()));
        }
        for (int i = 0; i < 2; i++) {
            int offset = i * 32;
            Thread thread = new Thread(() -> litter(offset), "litter");
            thread.setDaemon(true);
            thread.start();
        }
        answer(", \"ready\": true, \"parts\": " + PARTS.size());
        BufferedReader input = new BufferedReader(new InputStreamReader(System.in));
        for (String line = input.readLine(); line != null && !line.startsWith("quit"); line = input.readLine()) {
            String[] words = line.split(" ");
            if (words[0].equals("mutate")) {
                mutate(Integer.parseInt(words[1]), Integer.parseInt(words[2]));
            }
            long sum = 17;
            for (Part part : PARTS) {
                sum = sum * 31 + part.sum();
            }
            answer(", \"sum\": \"" + sum + "\", \"rounds\": " + ROUNDS);
        }
        answer("");
    }
}
