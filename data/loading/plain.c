/* Finds the images of plain records, many at once.
 *
 * records/plain_records.py says what a plain record is. Here it must also end where the index says that the next one
 * starts, and hold an image that has no problem in its header (headers.py). All other records are left to Python.
 * C without Python's headers: plain.py calls it with addresses. Everything is read byte by byte or copied, and no byte
 * is read that was not checked to lie in the file.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "RecordIO is read as it lies in the file, in little-endian numbers"
#endif

#define MAGIC 0xCED7230Au
#define LARGEST (1 << 24) /* bytes: a record that seems longer is not read ahead */
#define MOST_PIXELS (1 << 27) /* as headers.py says */

/* The first bytes of a plain record: PLAIN in records/plain_records.py. */
struct head {
    uint32_t magic, length, flag;
    float label;
    uint64_t id, id2;
};

#define HEAD ((int64_t)sizeof(struct head))
#define FRAME ((int64_t)offsetof(struct head, flag)) /* bytes that length does not count */

/* One .rec file with its index; plain.py has the same fields. */
struct shard {
    const uint8_t *bytes;
    int64_t size;
    const int64_t *offsets; /* of all records, images or not */
    int64_t records;
    int64_t start;  /* the first image's number in the data set */
    int64_t images;
    int64_t first;  /* the first image's record */
    int64_t first_label;
    int64_t classes; /* labels are below; 0 where no record is plain */
    int64_t checks_keys; /* whether a record's id is its key */
    const uint32_t *keys; /* null where key i is key_start + i * key_step */
    int64_t key_start, key_step;
};

/* Raised with every change of structs or arguments: plain.py takes no file that was compiled from an older text. */
int pfc_plain_version(void)
{
    return 2;
}

static uint32_t little(const uint8_t *at)
{
    uint32_t number;
    memcpy(&number, at, 4);
    return number;
}

static uint32_t big(const uint8_t *at, int bytes)
{
    uint32_t number = 0;
    for (int i = 0; i < bytes; i++)
        number = number << 8 | at[i];
    return number;
}

enum { NO_IMAGE, OPEN, CLOSED }; /* CLOSED: a decoder stops where the image ends, whatever may follow, damaged or not */

/* From the first scan on: whether each marker stands where the one before says, and the last bytes end the image. */
static int scans(const uint8_t *data, int64_t at, int64_t length)
{
    while (at + 4 <= length) {
        uint8_t marker = data[at + 1];
        int64_t segment = big(data + at + 2, 2);
        int is_scan = marker == 0xDA, is_table = marker == 0xC4 || marker == 0xDB || marker == 0xDD;
        int is_text = (marker & 0xF0) == 0xE0 || marker == 0xFE;
        if (data[at] != 0xFF || !(is_scan || is_table || is_text))
            return OPEN;
        if (segment < 3 || at + 2 + segment > length || (is_scan && segment != 6 + 2 * data[at + 4]))
            return OPEN;
        at += 2 + segment;
        while (is_scan) { /* coded bytes: 0xFF only before a zero or a restart's number */
            const uint8_t *next = memchr(data + at, 0xFF, length - at);
            if (!next || next + 1 == data + length)
                return OPEN;
            at = next - data;
            is_scan = !next[1] || (next[1] & 0xF8) == 0xD0;
            at += 2 * is_scan;
        }
        if (at + 2 == length && data[at] == 0xFF && data[at + 1] == 0xD9)
            return CLOSED;
    }
    return OPEN;
}

/* Of one sample; plain.py has the same fields. */
struct place {
    int64_t shard;
    int64_t label; /* -1 where it is not plain: the rest is then not set */
    int64_t begin, end; /* of the image, in bytes of the shard's file */
    int64_t height, width; /* by its header; 0 where a decoder may turn it */
    int64_t closed;
};

/* As headers.py: segment by segment up to the pixels. */
static int jpeg(const uint8_t *data, int64_t length, struct place *place)
{
    int has_frame = 0, has_exif = 0;
    for (int64_t at = 2; at + 4 <= length;) {
        uint8_t marker = data[at + 1];
        if (data[at] != 0xFF || marker < 0xC0 || (marker >= 0xD0 && marker <= 0xD9))
            return NO_IMAGE;
        if (marker == 0xFF) { /* a fill byte */
            at += 1;
            continue;
        }
        int64_t segment = big(data + at + 2, 2);
        if (segment < 2 || at + 2 + segment > length)
            return NO_IMAGE;
        if (marker == 0xDA) {
            if (has_exif && place->height != place->width)
                place->height = place->width = 0;
            return has_frame ? scans(data, at, length) : NO_IMAGE;
        }
        has_exif |= marker == 0xE1;
        if (marker < 0xD0 && marker != 0xC4 && marker != 0xC8 && marker != 0xCC) {
            if (segment < 8)
                return NO_IMAGE;
            uint32_t height = big(data + at + 5, 2), width = big(data + at + 7, 2), components = data[at + 9];
            if (!height || !width || (components != 1 && components != 3 && components != 4))
                return NO_IMAGE;
            if ((int64_t)height * width > MOST_PIXELS)
                return NO_IMAGE;
            place->height = height, place->width = width;
            has_frame = 1;
        }
        at += 2 + segment;
    }
    return NO_IMAGE;
}

/* As headers.py: chunk by chunk to the end. */
static int png(const uint8_t *data, int64_t length, struct place *place)
{
    int has_exif = 0;
    for (int64_t at = 8; at + 8 <= length;) {
        const uint8_t *kind = data + at + 4;
        uint32_t bytes = big(data + at, 4);
        if (at == 8) {
            if (memcmp(kind, "IHDR", 4) || bytes != 13 || length < at + 21)
                return NO_IMAGE;
            uint8_t depth = data[at + 16], colour = data[at + 17];
            place->width = big(data + at + 8, 4), place->height = big(data + at + 12, 4);
            if (!place->width || !place->height || place->height > MOST_PIXELS / place->width)
                return NO_IMAGE;
            if (depth != 1 && depth != 2 && depth != 4 && depth != 8 && depth != 16)
                return NO_IMAGE;
            if (colour != 0 && colour != 2 && colour != 3 && colour != 4 && colour != 6)
                return NO_IMAGE;
        }
        has_exif |= !memcmp(kind, "eXIf", 4);
        if (!memcmp(kind, "IEND", 4)) {
            if (has_exif && place->height != place->width)
                place->height = place->width = 0;
            return length >= at + 12 ? CLOSED : NO_IMAGE;
        }
        at += 8 + (int64_t)bytes + 4;
    }
    return NO_IMAGE;
}

static int image(const uint8_t *data, int64_t length, struct place *place)
{
    if (length >= 3 && !memcmp(data, "\xff\xd8\xff", 3))
        return jpeg(data, length, place);
    return length >= 8 && !memcmp(data, "\x89PNG\r\n\x1a\n", 8) ? png(data, length, place) : NO_IMAGE;
}

/* Whether another record starts inside: where the payload had the magic, writers cut the record into parts. */
static int holds_magic(const uint8_t *payload, int64_t length)
{
    uint32_t found = 0;
    for (int64_t at = 0; at + 4 <= length; at += 4) /* to the end, in vectors */
        found |= little(payload + at) == MAGIC;
    return found != 0;
}

/* The shard of a sample: the last one that starts at or before it. */
static int64_t shard_of(const struct shard *shards, int64_t count, int64_t sample)
{
    int64_t low = 0, high = count;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (shards[middle].start <= sample)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static int64_t key_of(const struct shard *shard, int64_t record)
{
    return shard->keys ? (int64_t)shard->keys[record] : shard->key_start + record * shard->key_step;
}

static int64_t label_of(const struct shard *shard, int64_t sample, struct place *place)
{
    int64_t number = sample - shard->start, record = shard->first + number;
    if (number < 0 || number >= shard->images || record < 0 || record >= shard->records)
        return -1;
    int64_t offset = shard->offsets[record];
    int64_t limit = record + 1 < shard->records ? shard->offsets[record + 1] : shard->size;
    if (offset < 0 || offset >= limit || limit > shard->size || limit - offset <= HEAD)
        return -1;
    const uint8_t *at = shard->bytes + offset;
    struct head head;
    memcpy(&head, at, HEAD);
    int64_t bytes = FRAME + (int64_t)head.length; /* the upper three bits of length are 0 in a record of one piece */
    if (head.magic != MAGIC || bytes <= HEAD || head.length >> 29 || offset + (bytes + 3) / 4 * 4 != limit)
        return -1;
    float label = head.label;
    if (head.flag || !(label >= 0 && label < shard->classes && label == (float)(int64_t)label))
        return -1;
    if (shard->checks_keys && head.id != (uint64_t)key_of(shard, record))
        return -1;
    int kind = image(at + HEAD, bytes - HEAD, place);
    if (kind == NO_IMAGE || holds_magic(at + FRAME, bytes - FRAME))
        return -1;
    place->begin = offset + HEAD;
    place->end = offset + bytes;
    place->closed = kind == CLOSED;
    return shard->first_label + (int64_t)label;
}

/* Where the images of n samples are. */
void pfc_plain_find(const struct shard *shards, int64_t count, const int64_t *samples, int64_t n, struct place *places)
{
    for (int64_t i = 0; i < n; i++) {
        const struct shard *shard = shards + shard_of(shards, count, samples[i]);
        int64_t record = shard->first + samples[i] - shard->start;
        int64_t offset = record >= 0 && record < shard->records ? shard->offsets[record] : -1;
        places[i].shard = shard - shards;
        if (offset >= 0 && offset < shard->size)
            __builtin_prefetch(shard->bytes + offset); /* so that the waits for the memory overlap */
    }
    for (int64_t i = 0; i < n; i++)
        places[i].label = label_of(shards + places[i].shard, samples[i], places + i);
}

/* Asks the system to read the records of n samples soon, by the index alone: none of their bytes is touched. */
void pfc_plain_will_need(const struct shard *shards, int64_t count, const int64_t *samples, int64_t n, int64_t page)
{
    for (int64_t i = 0; i < n; i++) {
        const struct shard *shard = shards + shard_of(shards, count, samples[i]);
        int64_t number = samples[i] - shard->start, record = shard->first + number;
        if (number < 0 || number >= shard->images || record < 0 || record >= shard->records)
            continue;
        int64_t offset = shard->offsets[record];
        int64_t limit = record + 1 < shard->records ? shard->offsets[record + 1] : shard->size;
        if (offset < 0 || offset >= limit || limit > shard->size || limit - offset > LARGEST)
            continue;
        const uint8_t *first = shard->bytes + offset / page * page; /* a file is mapped from the start of a page on */
        madvise((void *)first, shard->bytes + limit - first, MADV_WILLNEED);
    }
}

/* Copies these images into the rows of a matrix [n, width] and fills the rows up with zeros. */
void pfc_plain_copy(const struct shard *shards, const struct place *places, int64_t n, int64_t width, uint8_t *rows)
{
    for (int64_t i = 0; i < n; i++, rows += width) {
        int64_t length = places[i].end - places[i].begin;
        memcpy(rows, shards[places[i].shard].bytes + places[i].begin, length);
        memset(rows + length, 0, width - length);
    }
}
