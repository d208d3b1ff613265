/* Encrypted host files: AES by sectors of 512 bytes, on the way between a buffer and the host.
 * Source: the names of modes and initialization vectors are those of dm-crypt (plain64, essiv). */
#include <errno.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define SECTOR 512
#define VECTOR 16

struct cipher {
    EVP_CIPHER_CTX *encrypt, *decrypt;
    EVP_CIPHER_CTX *vector; /* NULL without essiv */
    bool by_guest;
    uint64_t origin;
};

static EVP_CIPHER_CTX *make_context(const EVP_CIPHER *type, const uint8_t *key, bool encrypt)
{
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    if (context && EVP_CipherInit_ex(context, type, NULL, key, NULL, encrypt) == 1
        && EVP_CIPHER_CTX_set_padding(context, 0) == 1)
        return context;
    EVP_CIPHER_CTX_free(context);
    return NULL;
}

static const EVP_CIPHER *find_type(uint32_t mode, uint32_t key_length)
{
    if (mode == VM_CIPHER_XTS)
        return key_length == 32 ? EVP_aes_128_xts() : key_length == 64 ? EVP_aes_256_xts() : NULL;
    if (mode != VM_CIPHER_CBC)
        return NULL;
    switch (key_length) {
    case 16:
        return EVP_aes_128_cbc();
    case 24:
        return EVP_aes_192_cbc();
    case 32:
        return EVP_aes_256_cbc();
    default:
        return NULL;
    }
}

static EVP_CIPHER_CTX *make_essiv(const struct vm_cipher *config)
{
    uint8_t hash[32];
    if (EVP_Digest(config->key, config->key_length, hash, NULL, EVP_sha256(), NULL) != 1)
        return NULL;
    EVP_CIPHER_CTX *context = make_context(EVP_aes_256_ecb(), hash, true);
    OPENSSL_cleanse(hash, sizeof hash);
    return context;
}

int cipher_create(const struct vm_cipher *config, struct cipher **ret)
{
    const EVP_CIPHER *type = find_type(config->mode, config->key_length);
    if (!type)
        return -EINVAL;
    struct cipher *cipher = calloc(1, sizeof *cipher);
    if (!cipher)
        return -ENOMEM;
    cipher->encrypt = make_context(type, config->key, true);
    cipher->decrypt = make_context(type, config->key, false);
    cipher->vector = config->essiv ? make_essiv(config) : NULL;
    cipher->by_guest = config->by_guest;
    cipher->origin = config->origin;
    if (!cipher->encrypt || !cipher->decrypt || (config->essiv && !cipher->vector)) {
        cipher_destroy(cipher);
        return -EINVAL;  // an XTS key whose halves are equal, for one
    }
    *ret = cipher;
    return 0;
}

void cipher_destroy(struct cipher *cipher)
{
    if (!cipher)
        return;
    EVP_CIPHER_CTX_free(cipher->encrypt);
    EVP_CIPHER_CTX_free(cipher->decrypt);
    EVP_CIPHER_CTX_free(cipher->vector);
    free(cipher);
}

static bool make_vector(const struct cipher *cipher, uint64_t number, uint8_t *ret)
{
    int length;
    memset(ret, 0, VECTOR);
    for (int i = 0; i < 8; i++)
        ret[i] = number >> (8 * i);
    return !cipher->vector || EVP_CipherUpdate(cipher->vector, ret, &length, ret, VECTOR) == 1;
}

int cipher_run(const struct cipher *cipher, bool encrypt, uint64_t host, uint64_t guest,
               const uint8_t *from, uint64_t length, uint8_t *ret)
{
    EVP_CIPHER_CTX *context = encrypt ? cipher->encrypt : cipher->decrypt;
    uint64_t number = (cipher->by_guest ? guest : host - cipher->origin) / SECTOR;
    for (uint64_t at = 0; at < length; at += SECTOR, number++) {
        uint8_t vector[VECTOR];
        int done;
        if (!make_vector(cipher, number, vector)
            || EVP_CipherInit_ex(context, NULL, NULL, NULL, vector, -1) != 1
            || EVP_CipherUpdate(context, ret + at, &done, from + at, SECTOR) != 1)
            return -EIO;
    }
    return 0;
}
